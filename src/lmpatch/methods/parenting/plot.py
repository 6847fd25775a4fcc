"""Pictures of what Parenting found: types by layer and by projection, and importance for both skills."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from ...errors import BadInput, MissingExtra
from ...patches.patch import Patch
from .units import TYPES

COLOURS = ("#7b3ff2", "#2f6fe0", "#d08700", "#c9ced6")  # in the order of TYPES


def plots(patch: Patch, folder: str | Path) -> list[Path]:
    """Write ``types.png`` and ``importance.png``.

    Raises:
        BadInput: the patch holds no units.
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # no pyplot: it keeps state and picks a screen
    except ImportError as error:
        raise MissingExtra('plots need matplotlib. Run: pip install "lmpatch[plot]"') from error
    units = patch.notes.get("units")
    if not units:
        raise BadInput(f"the {patch.method} patch holds no units. Give one of parenting, mode masked or merge.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layers = list(range(1 + max(layer for _, layer, _, _ in units)))
    names = list(dict.fromkeys(projection for _, _, projection, _ in units))
    short, some = [name.rpartition(".")[2] for name in names], layers[:: max(1, len(layers) // 9)]

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for axes, place, ticks in zip(figure.subplots(1, 2), (1, 2), (layers, names), strict=True):
        below = [0] * len(ticks)
        for t, colour in zip(TYPES, COLOURS, strict=True):
            counts = [sum(unit[place] == tick and unit[3] == t for unit in units) for tick in ticks]
            axes.bar(range(len(ticks)), counts, bottom=below, color=colour, label=t)
            below = [a + b for a, b in zip(below, counts, strict=True)]
        axes.locator_params(axis="y", integer=True)
        axes.set_ylim(0, 1.25 * max(below))  # room for the legend
    figure.axes[0].set_xticks(some)
    figure.axes[0].set(xlabel="layer", ylabel="units")
    figure.axes[1].set_xticks(range(len(names)), short, fontsize=8)
    figure.axes[1].legend(fontsize=8, ncols=4, loc="upper center")
    figure.savefig(folder / "types.png", dpi=150, format="png")

    figure = Figure(figsize=(10, 1.6 + 0.35 * len(names)), layout="constrained")
    for axes, (skill, found) in zip(figure.subplots(1, 2), patch.notes["scores"].items(), strict=True):
        cells: dict[tuple[str, int], list[float]] = {}  # several units of one projection are averaged
        for (_, layer, projection, _), value in zip(units, found["z"], strict=True):
            cells.setdefault((projection, layer), []).append(value)
        grid = [[fmean(cells.get((name, layer), [0.0])) for layer in layers] for name in names]
        image = axes.imshow(grid, aspect="auto", cmap="viridis")
        axes.set_yticks(range(len(names)), short, fontsize=8)
        axes.set_xticks(some)
        axes.set(xlabel="layer", title=f"{skill}: z-score of importance")
        figure.colorbar(image, ax=axes)
    figure.savefig(folder / "importance.png", dpi=150, format="png")
    return [folder / "types.png", folder / "importance.png"]
