"""A table as values, printed as Markdown or LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from .stats import table

SIGNS = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "±": r"$\pm$", "×": r"$\times$", "≥": r"$\geq$",
         "≤": r"$\leq$", "λ": r"$\lambda$", "$": r"\$"}  # fmt: skip


class Grid(NamedTuple):
    """A table. A line whose cells but the first are empty is a heading, where the first is bold (``**``)."""

    head: Sequence[str]
    lines: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        """With its note below."""
        return table(self.head, self.lines) + (f"\n\n{self.note}" if self.note else "")

    def latex(self, caption: str, label: str) -> str:
        """A ``table`` that needs the package booktabs."""
        body = [f"{' & '.join(map(escaped, line))} \\\\" for line in self.lines]
        columns = "l" + "r" * (len(self.head) - 1)
        return "\n".join(
            [
                r"\begin{table}",
                f"\\caption{{{escaped(caption)} {escaped(self.note)}}}\\label{{{label}}}",
                f"\\begin{{tabular}}{{{columns}}}",
                r"\toprule",
                f"{' & '.join(map(escaped, self.head))} \\\\",
                r"\midrule",
                *body,
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
            ]
        )


def escaped(text: str) -> str:
    """Markdown of a cell as LaTeX."""
    text = "".join(SIGNS.get(sign, sign) for sign in text.strip())
    text = re.sub(r"\*\*(.+?)\*\*", r"\\textbf{\1}", text)
    return re.sub(r"`(.+?)`", r"\\texttt{\1}", text)
