"""A run in one HTML file: a summary, its tables, and its plots within the file."""

import base64
import tempfile
from collections.abc import Iterator
from html import escape
from pathlib import Path

from torch import nn

from tosa_convert.base.files import read_json, write_text
from tosa_convert.base.progress import Progress
from tosa_convert.data.images import built_in_scenes
from tosa_convert.measure.macs import flops_on
from tosa_convert.reporting.plots import cost_plot, loss_plot, views_plot
from tosa_convert.reporting.result_tables import tables_of
from tosa_convert.reporting.summary import summary_table
from tosa_convert.reporting.token_maps import look_at_files
from tosa_convert.runs.metrics_log import read_metrics

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #333; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.8rem; border-bottom: 1px solid #d9dde2; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
pre { background: #f4f5f7; padding: 0.8rem; overflow-x: auto; }
.note { color: #777; font-size: 0.9em; margin: 0.2rem 0; }
"""


def write_html(folder: Path, model: nn.Module, file: Path, progress: Progress) -> None:
    """Write the report of a run in ``folder``, whose model is ``model``."""
    config = read_json(folder / "config.json")
    made = f"Made by tosa-convert {config['tosa_convert']}, {config['created']}."
    parts = [f"<h1>{escape(folder.name)}</h1><p>{escape(made)}</p>"]
    known = config.get("results")  # a run saved from Python has none
    cost = known["flops"] if known else flops_on(model, progress=progress)
    parts += [table.html() for table in [summary_table(folder, cost), *tables_of(folder)]]
    with tempfile.TemporaryDirectory() as place, progress.track("plots", 4) as advance:
        for title, plot in _plots(folder, model, cost, Path(place)):
            parts.append(f"<h2>{escape(title)}</h2>{_embedded(plot, title)}")
            advance()
    recipe = folder / "recipe.yaml"
    if recipe.exists():
        parts.append(f"<h2>Recipe</h2><pre>{escape(recipe.read_text(encoding='utf-8'))}</pre>")
    head = f"<!doctype html><meta charset=utf-8><title>{escape(folder.name)}</title><style>{STYLE}</style>"
    write_text(file, head + "\n".join(parts) + "\n")


def _plots(folder: Path, model: nn.Module, cost: dict, place: Path) -> Iterator[tuple[str, Path]]:
    """Titles and files; those that are drawn here are in ``place``."""
    yield "Tokens and multiply–adds", cost_plot(cost, f"{cost['saved']:.1%} saved", place / "cost.png")
    steps = [line for line in read_metrics(folder) if "step" in line and "loss" in line]
    if len(steps) > 1:  # one point makes no line
        yield "Training", loss_plot(steps, place / "loss.png")
    looks = look_at_files(model, built_in_scenes())
    if looks.views[0]:
        yield "Which patches attend", views_plot(looks, place / "views.png")
    if (folder / "bench.png").exists():
        yield "Speed", folder / "bench.png"


def _embedded(plot: Path, title: str) -> str:
    data = base64.b64encode(plot.read_bytes()).decode()
    return f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'
