"""The plots that the pages show, from committed rows."""

from __future__ import annotations

from typing import Any

from .facts_rows import METRICS, metric
from .rows import RESULTS, of, summary

Point = tuple[int, str, str]
"""Facts in the model, folder, run."""
SERIES: dict[str, tuple[Point, ...]] = {
    "recipe": tuple((n, f"recipe-counterfact-{n}", "recipe") for n in (1, 10, 100, 1000, 5000)),
    "recipe, fact as text (RAG)": ((5000, "recipe-counterfact-5000", "recipe_text"),),
    "fact in the prompt": tuple((n, f"recipe-counterfact-{n}", "fact_in_prompt") for n in (1, 10, 100, 1000, 5000)),
    "rome, one at a time": ((1, "facts-single", "rome"),),
    "r_rome, one at a time": ((1, "facts-single", "r_rome"),),
    "FT-L, one at a time": ((1, "facts-single", "ft_l"),),
    "FT-M": ((1, "facts-single", "ft_m"), (100, "facts-commit", "ft_m"), (1000, "general-facts", "ft_m")),
    "memit, one commit": ((100, "facts-commit", "memit"), (1000, "general-facts", "memit")),
    "memit, alphaedit, one commit": (
        (100, "facts-commit", "memit_alphaedit"), (1000, "general-facts", "memit_alphaedit"),
    ),
    "memit, commits of 100, at the end": ((500, "facts-stream", "memit"),),
}  # fmt: skip
PANELS = {
    "tf stated": "states the new fact", "tf reworded": "paraphrase", "tf near": "same relation, unchanged",
    "tf far": "unrelated, unchanged",
}  # fmt: skip
WRITTEN = "facts-stream"
"""Its run stopped: of those asked, the facts that were never written do not count here."""


def _value(folder: str, run: str, panel: str) -> float:
    if folder == WRITTEN and panel in ("tf stated", "tf reworded"):
        kind, value = METRICS[panel]
        rows = [row for row in of(folder, run) if row["when"] == "final" and row["kind"] == kind and "flag" not in row]
        values = [one for one in map(value, rows) if one is not None]
        return 100 * sum(values) / len(values)
    found = metric(folder, run, panel)
    return 100 * found.value if found else float("nan")


def _figure(width: float, panels: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.9), layout="constrained")
    return figure, figure.subplots(1, panels, sharey=True)


def facts_plot() -> None:
    """Teacher-forced accuracy against the number of facts in the model."""
    figure, axes = _figure(16.5, len(PANELS))
    for axis, (panel, title) in zip(axes, PANELS.items(), strict=True):
        for marker, (label, points) in zip("oPsv^<D>Xd", SERIES.items(), strict=True):
            xs, ys = [n for n, *_ in points], [_value(folder, run, panel) for _, folder, run in points]
            axis.plot(
                xs,
                ys,
                marker=marker,
                lw=3 if label == "recipe" else 1,
                ms=7,
                alpha=0.8,
                label=label,
                zorder=4 - len(points),
            )
        axis.set(title=title, xscale="log", xlabel="facts in the model", ylim=(-3, 103))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("teacher-forced, %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside right center")
    figure.savefig(RESULTS / "recipe.png", dpi=110)


def factor_plot() -> None:
    """IRCAN on MemoTrap's dev records: the share answered as told against factor and number of neurons."""
    found = summary("ircan-memotrap/chosen.json")
    (_, _, before), *tried = found["tables"]["ircan"]
    figure, axis = _figure(6.5, 1)
    for marker, count in zip("osD^vP", (4, 8, 16, 32, 48, 64), strict=True):
        line = [(factor, 100 * share) for neurons, factor, share in tried if neurons == count]
        axis.plot(*zip(*line, strict=True), marker=marker, ms=4, label=f"{count} neurons")
    axis.axhline(100 * before, ls="--", color="grey", label="unpatched")
    axis.set(xlabel="factor", xscale="log", ylabel="answered as told, %", xticks=[1.25, 2, 3, 5, 10, 20])
    axis.set_xticklabels(["1.25", "2", "3", "5", "10", "20"])
    axis.set_xticks([], minor=True)
    axis.set_title(f"ircan on {found['dev_records']} dev records of MemoTrap", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(RESULTS / "ircan-memotrap/accuracy-by-beta.png", dpi=110)


def draw() -> None:
    """Every plot."""
    facts_plot()
    factor_plot()
