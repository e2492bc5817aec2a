"""Plans and comparisons on files: what the commands plan and compare write to a folder."""

import copy
from dataclasses import asdict
from pathlib import Path

from tosa_convert.base import distributed as processes
from tosa_convert.base.environment import machine
from tosa_convert.base.errors import UsageError
from tosa_convert.base.files import write_json, write_text
from tosa_convert.base.progress import Progress
from tosa_convert.config.recipe import Data, Recipe
from tosa_convert.config.settings import ExportSettings
from tosa_convert.measure.macs import flops
from tosa_convert.planning.comparison import compare, labelled_sample, mean_figures
from tosa_convert.planning.cost_model import Conditions
from tosa_convert.planning.mean_macs import FEWEST
from tosa_convert.planning.plan import find_plan
from tosa_convert.reporting.plan_tables import compare_table
from tosa_convert.reporting.table import percent
from tosa_convert.runs import folder as runs
from tosa_convert.runs.loading import load
from tosa_convert.runs.lock import writes_alone
from tosa_convert.selective.conversion import convert
from tosa_convert.tasks.task import task_of


@writes_alone
def plan_stage(
    source: str,
    *,
    data: str | None,
    images: int,
    labels: bool,
    budget: float | None,
    target_drop: float | None,
    keep: str | None,
    by: str,
    runtime: str,
    precision: str = "float32",
    threads: int = 1,
    batch_size: int = 1,
    target_ms: float | None = None,
    segment: int | None = None,
    adaptive: bool = False,
    max_macs: float | None = None,
    checkpoint: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    head: dict | None = None,
    out: Path,
    device: str | None = None,
    progress: Progress | None = None,
) -> dict:
    """A plan for a model: ``plan.yaml``, a recipe; ``plan.json``; and ``plan.png``, tokens per layer, in ``out``."""
    from tosa_convert.reporting.plots import tokens_plot

    device = processes.pick_device(device)
    head = head or {}
    model = load(source, checkpoint=checkpoint, img_size=img_size, num_classes=num_classes, **head)
    pixels, folder, truths = labelled_sample(model, data, images, labels, crops=not adaptive)
    if adaptive and len(pixels) < FEWEST:
        raise UsageError(
            f"{len(pixels)} image{'s' if len(pixels) > 1 else ''} of {folder.name} cannot show how images differ; give "
            f"{FEWEST} or more, better 24, of the kind that the model will see"
        )
    runs.prepare(out)
    model.to(device)
    options = {
        "keep": keep,
        "by": by,
        "conditions": Conditions(runtime, precision, threads, batch_size, device),
        "target_ms": target_ms,
        "segment": segment,
        "adaptive": adaptive,
        "max_macs": max_macs,
        "labels": truths,
        "target_drop": target_drop,
        "progress": progress,
    }
    plan = find_plan(model, pixels, budget, **options)
    converted = convert(copy.deepcopy(model), plan.config)
    cost = flops(converted, images=pixels if adaptive else None, progress=progress)
    recipe = Recipe(
        model=source,
        checkpoint=checkpoint and str(checkpoint),
        img_size=img_size,
        num_classes=num_classes,
        **head,
        data=Data(train=data),  # what the export is checked on
        convert=plan.config,
        export=ExportSettings(images=images, labels=labels, precision=precision, threads=threads),
    )
    results = {
        "source": source,
        "data": folder.name,
        "convert": plan.config.model_dump(),
        "plan": {name: value for name, value in asdict(plan).items() if name not in ("config", "timed")},
        "error_is": task_of(model).error_is if plan.keep == "map" else None,
        "macs": cost.macs / cost.original,
        "latency": plan.timed and {**asdict(plan.timed), "share": plan.timed.share, "met": plan.timed.met},
        **mean_figures(model, {"plan": converted}, pixels, truths)["plan"],
        "recipe": str(out / "plan.yaml"),
        "plot": str(out / "plan.png"),
        "machine": machine(device),
    }
    head = (
        f"# {plan.config.score} × {plan.config.bypass} at {percent(cost.macs / cost.original)} of the MACs, found by\n"
    )
    head += f"# `tosa-convert plan` without training.\n#\n#   tosa-convert run {out / 'plan.yaml'}\n\n"
    write_text(out / "plan.yaml", head + recipe.to_yaml())
    write_json(out / "plan.json", results)
    tokens_plot(
        cost.to_dict(), f"{Path(source).name}: {percent(cost.macs / cost.original)} of the MACs", out / "plan.png"
    )
    return results


@writes_alone
def compare_stage(
    source: str, *, out: Path, checkpoint=None, img_size=None, num_classes=None, head=None, **options
) -> dict:
    """A comparison of methods; ``compare.json``, ``compare.md`` and ``compare.png`` in ``out``."""
    from tosa_convert.reporting.plots import pareto_plot

    model = load(source, checkpoint=checkpoint, img_size=img_size, num_classes=num_classes, **(head or {}))
    runs.prepare(out)
    results = {"source": source, **compare(model, **options)}
    results["plot"] = str(out / "compare.png")
    write_json(out / "compare.json", results)  # before the plot: figures count for more
    write_text(out / "compare.md", compare_table(results).markdown())
    pareto_plot(results, out / "compare.png")
    return results
