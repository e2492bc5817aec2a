"""Pictures of results, as PNG."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tosa_convert.files import atomic

INK, BAR, IDEAL, SKIPPED = "#333333", "#3b76af", "#d1642e", "#d9dde2"
MARKS = "osD^vPX*<>"
KINDS = {"patch": "cosine of patch tokens", "class": "cosine of the class token", "agreement": "agreement"}
ROOM = 0.34  # inches per bar


def speedup_picture(results: dict, file: Path) -> Path:
    """One bar per case and model: the measured speed-up, beside a mark at what the multiply–adds promise.

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
    return f"{case['runtime']}, {case['size'][0]} px, batch {case['batch_size']}, {case['precision']}"


def tokens_picture(layers: list[dict], title: str, file: Path) -> Path:
    """How many patches run each layer, as bars; ``layers`` are dictionaries of :class:`tosa_convert.macs.LayerCost`."""
    figure = Figure(figsize=(1.6 + 0.45 * len(layers), 3.4), layout="constrained")
    axes = figure.subplots()
    places, tokens = [layer["layer"] for layer in layers], [layer["tokens"] for layer in layers]
    most = max(tokens)
    axes.bar(places, [most] * len(places), color=SKIPPED, label="skipped")
    axes.bar(places, tokens, color=BAR, label="attend")
    for place, count in zip(places, tokens, strict=True):
        axes.text(place, count - 0.02 * most, str(count), ha="center", va="top", color="white", fontsize=7)
    axes.set_xticks(places)
    axes.set_xlabel("layer")
    axes.set_ylabel("patches")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return _write(figure, file)


def pareto_picture(results: dict, file: Path) -> Path:
    """Error of each method over its multiply–adds, and over its latency where that was measured.

    Args:
        results: of :func:`tosa_convert.comparing.compare`.
        file: the PNG.
    """
    rows = results["rows"]
    axis = {"macs": "share of the original's MACs"}
    if rows and "ms" in rows[0]:
        axis["ms"] = f"ms per picture ({results['runtime']})"
    kinds = [name for name in ("patch", "class", "agreement") if any(name in row for row in rows)]
    kind = kinds[0] if kinds else "patch"
    figure = Figure(figsize=(5.2 * len(axis), 4.6), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, len(axis), squeeze=False)[0], axis.items(), strict=True):
        for index, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
            points = sorted(
                (row[key], max(1 - row[kind], 1e-6)) for row in rows if row["method"] == name and kind in row
            )
            if points:
                axes.plot(*zip(*points, strict=True), marker=MARKS[index % len(MARKS)], color=f"C{index}", label=name)
        if key == "ms":
            axes.axvline(results["original"]["ms"], color=INK, linestyle=":", linewidth=1)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel(label)
        axes.set_ylabel(f"1 − {KINDS[kind]}")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False)
    return _write(figure, file)


def _write(figure: Figure, file: Path) -> Path:
    with atomic(file) as temporary, matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        figure.savefig(temporary, format="png", dpi=120)
    return file
