"""Pictures of results, as PNG."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from tosa_convert.files import atomic

INK, BAR, IDEAL = "#333333", "#3b76af", "#d1642e"
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
    with atomic(file) as temporary, matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        figure.savefig(temporary, format="png", dpi=120)
    return file


def _case(case: dict) -> str:
    return f"{case['runtime']}, {case['size'][0]} px, batch {case['batch_size']}, {case['precision']}"
