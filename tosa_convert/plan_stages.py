"""Plans and comparisons on files: what the commands of these names leave in a folder."""

import copy
from dataclasses import asdict
from pathlib import Path

from tosa_convert import processes, runs
from tosa_convert.comparing import compare, labelled_sample, mean_figures
from tosa_convert.files import write_json, write_text
from tosa_convert.loading import load
from tosa_convert.machine import machine
from tosa_convert.macs import flops
from tosa_convert.planning import find_plan
from tosa_convert.prices import time_models
from tosa_convert.progress import Progress
from tosa_convert.recipe import Recipe
from tosa_convert.report import compare_table, percent
from tosa_convert.settings import ExportSettings
from tosa_convert.surgery import convert


def plan_stage(
    source: str,
    *,
    data: str | None,
    images: int,
    labels: bool,
    budget: float | None,
    target_drop: float | None,
    by: str,
    runtime: str,
    checkpoint: str | None = None,
    img_size: int | None = None,
    num_classes: int | None = None,
    out: Path,
    device: str | None = None,
    progress: Progress | None = None,
) -> dict:
    """A plan for a model: ``plan.yaml``, a recipe; ``plan.json``; and ``plan.png``, tokens per layer, in ``out``."""
    from tosa_convert.pictures import tokens_picture

    model = load(source, checkpoint=checkpoint, img_size=img_size, num_classes=num_classes)
    runs.prepare(out)
    model.to(processes.pick_device(device))
    pictures, folder, truths = labelled_sample(model, data, images, labels)
    options = {"by": by, "runtime": runtime, "labels": truths, "target_drop": target_drop, "progress": progress}
    plan = find_plan(model, pictures, budget, **options)
    converted = convert(copy.deepcopy(model), plan.config)
    cost = flops(converted)
    latency = None
    if by == "latency":
        times = time_models({"original": model, "plan": converted}, runtime, progress or Progress())
        latency = times["plan"] / times["original"]
    recipe = Recipe(
        model=source,
        checkpoint=checkpoint and str(checkpoint),
        img_size=img_size,
        num_classes=num_classes,
        convert=plan.config,
        export=ExportSettings(),
    )
    results = {
        "source": source,
        "data": folder.name,
        "convert": plan.config.model_dump(),
        "plan": {name: value for name, value in asdict(plan).items() if name != "config"},
        "macs": cost.macs / cost.original,
        "latency": latency,
        **mean_figures(model, {"plan": converted}, pictures, truths)["plan"],
        "recipe": str(out / "plan.yaml"),
        "picture": str(out / "plan.png"),
        "machine": machine(device),
    }
    head = (
        f"# {plan.config.score} × {plan.config.bypass} at {percent(cost.macs / cost.original)} of the MACs, found by\n"
    )
    head += f"# `tosa-convert plan` without training.\n#\n#   tosa-convert run {out / 'plan.yaml'}\n\n"
    write_text(out / "plan.yaml", head + recipe.to_yaml())
    tokens_picture(
        cost.to_dict(), f"{Path(source).name}: {percent(cost.macs / cost.original)} of the MACs", out / "plan.png"
    )
    write_json(out / "plan.json", results)
    return results


def compare_stage(source: str, *, out: Path, checkpoint=None, img_size=None, num_classes=None, **options) -> dict:
    """Methods compared; ``compare.json``, ``compare.md`` and ``compare.png`` in ``out``."""
    from tosa_convert.pictures import pareto_picture

    model = load(source, checkpoint=checkpoint, img_size=img_size, num_classes=num_classes)
    runs.prepare(out)
    results = {"source": source, **compare(model, **options)}
    results["picture"] = str(pareto_picture(results, out / "compare.png"))
    write_json(out / "compare.json", results)
    write_text(out / "compare.md", compare_table(results).markdown())
    return results
