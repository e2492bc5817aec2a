"""Plots of results, as PNG."""

from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tosa_convert.base.files import atomic
from tosa_convert.reporting.figures import pixels
from tosa_convert.reporting.map_panels import Panel
from tosa_convert.reporting.token_maps import Looks, View
from tosa_convert.tasks.task import differences

INK, BAR, IDEAL, SKIPPED, CHANCE = "#333333", "#3b76af", "#d1642e", "#d9dde2", "#888888"
MARKS = "osD^vPX*<>dhp"
COLOURS = 10  # of matplotlib's cycle; the lines after them are dashed
KINDS = {
    "patch": "cosine of patch tokens",
    "class": "cosine of the class token",
    "pooled": "cosine",
    "agreement": "agreement",
}
ROOM = 0.34  # inches per bar
PANEL, PANELS = 1.9, 7  # inches of a panel's side, and most panels in a row
DARK = 0.2  # brightness of a skipped patch


def speedup_plot(results: dict, file: Path) -> Path:
    """One bar per case and model: the measured speed-up, with a mark at the one expected from MACs.

    Args:
        results: of :func:`tosa_convert.bench`.
        file: the PNG.
    """
    bars = [
        (f"{name}\n{_case(case)}", figures)
        for case in results["cases"]
        for name, figures in case["models"].items()
        if "speedup" in figures
    ]
    figure = Figure(figsize=(8, 1.5 + 1.6 * ROOM * len(bars)), layout="constrained")
    axes = figure.subplots()
    places = range(len(bars))
    speedups = [figures["speedup"] for _, figures in bars]
    errors = [
        [max(0.0, figures["speedup"] - figures["speedup_quartiles"][0]) for _, figures in bars],
        [max(0.0, figures["speedup_quartiles"][1] - figures["speedup"]) for _, figures in bars],
    ]
    axes.barh(places, speedups, height=0.6, color=BAR, xerr=errors, ecolor=INK, label="measured (bar: quartiles)")
    ideals = [figures["ideal"] for _, figures in bars]
    axes.scatter(ideals, places, marker="|", s=350, linewidths=2.5, color=IDEAL, zorder=3, label="ideal, from MACs")
    for place, speedup in zip(places, speedups, strict=True):
        axes.text(0.01, place, f"{speedup:.2f}×", va="center", color="white", fontsize=9)
    axes.axvline(1, color=INK, linewidth=1, linestyle=":")
    axes.set_yticks(places, [label for label, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel(f"speed-up over {results['reference']} (1 = no gain)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return _write(figure, file)


def _case(case: dict) -> str:
    return f"{case['runtime']}, {pixels(case['size'])} px, batch {case['batch_size']}, {case['precision']}"


def tokens_plot(cost: dict, title: str, file: Path) -> Path:
    """How many patches run each layer; ``cost`` is that of :meth:`tosa_convert.measure.macs.Cost.to_dict`."""
    figure = Figure(figsize=(1.6 + 0.45 * len(cost["layers"]), 3.4), layout="constrained")
    axes = figure.subplots()
    _tokens(axes, cost)
    axes.set_xlabel("layer")
    axes.set_ylabel("patches")
    axes.set_title(title, fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return _write(figure, file)


def cost_plot(cost: dict, title: str, file: Path) -> Path:
    """Tokens and multiply–adds of each layer; ``cost`` is that of :meth:`tosa_convert.measure.macs.Cost.to_dict`."""
    layers = cost["layers"]
    figure = Figure(figsize=(2.2 + 0.45 * len(layers), 5.6), layout="constrained")
    tokens, macs = figure.subplots(2, 1, sharex=True)
    _tokens(tokens, cost)
    tokens.set_ylabel("patches")
    tokens.set_title(title, fontsize=10)
    places = [layer["layer"] for layer in layers]
    parts = {"original": (SKIPPED, None), "macs": (BAR, None), "selector": (IDEAL, "of it token selection")}
    for key, (colour, label) in parts.items():
        macs.bar(places, [layer[key] / 1e6 for layer in layers], color=colour, label=label)
    macs.set_xlabel("layer")
    macs.set_ylabel("million multiply–adds")
    macs.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return _write(figure, file)


def _tokens(axes: Axes, cost: dict) -> None:
    places, counts = zip(*((layer["layer"], layer["tokens"]) for layer in cost["layers"]), strict=True)
    axes.bar(places, cost["patches"], color=SKIPPED, label="skipped")
    axes.bar(places, counts, color=BAR, label="attend")
    for place, count in zip(places, counts, strict=True):
        axes.text(place, count - 0.02 * cost["patches"], str(count), ha="center", va="top", color="white", fontsize=7)
    axes.set_xticks(places)
    axes.spines[["top", "right"]].set_visible(False)


def loss_plot(lines: list[dict], file: Path) -> Path:
    """The loss over the steps; ``lines`` are those of ``metrics.jsonl`` that have both."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], color=BAR)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return _write(figure, file)


def views_plot(looks: Looks, file: Path) -> Path:
    """As Figure 4 of the ToSA paper: each image, followed by one panel per selective layer with skipped patches dark.
    Lines connect skipped patches with the patches that represent them. The maps of dense models come behind the image,
    with their scale."""
    images, names, views, maps = looks
    between = len(maps[0]) if maps else 0
    panels = 1 + between + len(views[0])
    down = -(-panels // PANELS)
    across = -(-panels // down)
    height, width = images[0].shape[:2]
    under = 0.5 if maps else 0.25  # inches, for titles and scales
    size = (across * PANEL, down * len(images) * (PANEL * height / width + under))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(down * len(images), across, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for index, (image, seen, name) in enumerate(zip(images, views, names, strict=True)):
        mine = grid[index * down : (index + 1) * down].flat
        mine[0].imshow(image)
        mine[0].set_title(name, fontsize=8)
        for axes, panel in zip(mine[1 : 1 + between], maps[index] if maps else (), strict=True):
            _draw_map(figure, axes, panel)
        for axes, view in zip(mine[1 + between : panels], seen, strict=True):
            _draw_view(axes, image, view)
    return _write(figure, file)


def _draw_map(figure: Figure, axes: Axes, panel: Panel) -> None:
    """A map in perceptual colours, with a bar of its scale."""
    colours = "magma" if panel.difference else "viridis"
    seen = axes.imshow(panel.values, cmap=colours, vmin=panel.low, vmax=panel.high)
    under = axes.inset_axes((0, -0.1, 1, 0.05))  # taken from no panel, so that all of a row stay in line
    bar = figure.colorbar(seen, cax=under, orientation="horizontal")
    bar.ax.tick_params(labelsize=6)
    bar.ax.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_title(
        f"{panel.title}{panel.unit and f' ({panel.unit})'}" if not panel.difference else panel.title, fontsize=8
    )


def _draw_view(axes: Axes, image: np.ndarray, view: View) -> None:
    rows, columns = view.attended.shape
    height, width = image.shape[:2]
    down, across = height / rows, width / columns  # not whole where patches overlap
    light = DARK + (1 - DARK) * view.attended.clip(0, 1)
    light = light[np.arange(height) * rows // height][:, np.arange(width) * columns // width]
    axes.imshow(image * light[..., None])
    lines = [[((column + 0.5) * across, (row + 0.5) * down) for row, column in pair] for pair in view.partners]
    axes.add_collection(LineCollection(lines, colors=IDEAL, linewidths=min(0.6, 10 / max(rows, columns))))
    axes.set_title(f"layer {view.layer}: {round(view.attended.sum())} of {rows * columns}", fontsize=8)


def pareto_plot(results: dict, file: Path) -> Path:
    """Error of each method over its MACs, and over its latency where that was measured.

    Args:
        results: of :func:`tosa_convert.planning.comparison.compare`.
        file: the PNG.
    """
    rows = results["rows"]
    axis = {"macs": "share of the original's MACs"}
    if rows and "ms" in rows[0]:
        axis["ms"] = f"ms per image ({results['runtime']})"
    first = {"pooled": ("pooled", "class"), "logits": ("agreement",), "patches": ("patch",)}.get(results["keep"], ())
    kinds = [name for name in (*first, *differences(), *KINDS) if any(name in row for row in rows)]
    kind = kinds[0] if kinds else "patch"
    written, lost = _error_of(kind)
    figure = Figure(figsize=(5.2 * len(axis), 4.6), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, len(axis), squeeze=False)[0], axis.items(), strict=True):
        for index, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
            points = sorted(
                (row[key], max(lost(row[kind]), 1e-6)) for row in rows if row["method"] == name and kind in row
            )
            if points:
                axes.plot(*zip(*points, strict=True), **_style(name, index), label=name)
        if key == "ms":
            axes.axvline(results["original"]["ms"], color=INK, linestyle=":", linewidth=1)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel(label)
        axes.set_ylabel(written)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False)
    return _write(figure, file)


def _style(name: str, index: int) -> dict:
    """Of a method's line; chance, which is there to be compared with, stays in the background."""
    if name.startswith("random"):
        return {"marker": MARKS[index % len(MARKS)], "color": CHANCE, "linestyle": ":"}
    dashed = {"linestyle": "--"} if index >= COLOURS else {}
    return {"marker": MARKS[index % len(MARKS)], "color": f"C{index % COLOURS}", **dashed}


def _error_of(kind: str) -> tuple[str, Callable[[float], float]]:
    """What is drawn of a figure, and how it follows from it: an error, or what is missing of 1."""
    metric = differences().get(kind)
    if metric is not None and not metric.higher_is_better:
        return metric.title, lambda value: value
    return f"1 − {metric.title if metric else KINDS[kind]}", lambda value: 1 - value


def _write(figure: Figure, file: Path) -> Path:
    with atomic(file) as temporary, matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight")
    return file
