"""Write every figure of README.md, docs and results/*.md that comes from a run, from the committed rows.

    python benchmarks/write_numbers.py            rewrite the blocks between the markers
    python benchmarks/write_numbers.py --check    say which pages differ; exit code 1 if one does
    python benchmarks/write_numbers.py --plots    draw the plots that the pages show, too; needs matplotlib

Nothing else is needed: no torch, no numpy, a few seconds. tables/pages.py lists the blocks.
"""

from __future__ import annotations

import argparse
import sys

from tables.pages import ROOT, pages, render


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--plots", action="store_true", help="draw the plots, too")
    args = parser.parse_args()
    stale = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        made = render(text)
        if made != text:
            stale.append(str(page.relative_to(ROOT)))
            if not args.check:
                page.write_text(made, encoding="utf-8")
    if args.plots:
        from tables import plots

        plots.draw()
    print(
        f"{'differs' if args.check else 'written'}: {', '.join(stale)}" if stale else "every figure is that of the rows"
    )
    sys.exit(1 if args.check and stale else 0)


if __name__ == "__main__":
    main()
