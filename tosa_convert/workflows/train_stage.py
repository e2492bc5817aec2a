"""A training on files: from a model and a recipe to a finished run, however often it is interrupted."""

import shutil
from pathlib import Path

from torch import nn

from tosa_convert.base import distributed as processes
from tosa_convert.base.errors import TosaError
from tosa_convert.base.files import read_json, write_json, write_text
from tosa_convert.config.recipe import Recipe
from tosa_convert.config.settings import DistillSettings, FinetuneSettings
from tosa_convert.reporting.run_texts import write_report
from tosa_convert.runs import folder as runs
from tosa_convert.runs.provenance import as_it_is
from tosa_convert.selective.conversion import is_whole
from tosa_convert.selective.selection import keeps_any_number
from tosa_convert.training.distillation import distill
from tosa_convert.training.engine import CHECKPOINT
from tosa_convert.training.finetuning import finetune
from tosa_convert.training.impact import FILE as IMPACT
from tosa_convert.workflows.same_job import check_same_job, check_same_source, check_stage
from tosa_convert.workflows.sources import train_source
from tosa_convert.workflows.thresholds import check_thresholds, cost_of, warn_of_other_cost, with_mean


def train_stage(
    name: str, model: nn.Module, recipe: Recipe, out: Path, resume: bool, device, progress, source: Path | None = None
) -> dict:
    """Train a model into a run. ``source`` is the one that it comes from, if it comes from one."""
    settings: DistillSettings | FinetuneSettings = getattr(recipe, name)
    check_thresholds(model, recipe)
    verb = {"distill": distill, "finetune": finetune}[name]
    resolved = recipe.model_copy(update={"convert": model.tosa_config})
    if resume:
        check_same_job(resolved, out / "recipe.yaml", name)
    processes.join(device)
    if resume and runs.is_run(out):
        check_stage(out, name)
        if processes.is_main():
            _tidy(out)
        return read_json(out / "config.json")["results"]
    begun = check_same_source(source, out, resume)
    if processes.is_main():
        runs.prepare(out, resume)
        write_text(out / "recipe.yaml", resolved.to_yaml())
        if begun:
            write_json(out / runs.SOURCE, begun)
    processes.join(device)
    trained_on = source is not None and runs.is_converted_run(source)
    may_move = trained_on and recipe.mean_macs is None and keeps_any_number(model)
    before = cost_of(model, recipe, progress) if may_move else None
    options = {"seed": recipe.seed, "device": device, "progress": progress}
    if name == "finetune":
        options |= {"masks": recipe.data.masks, "boxes": recipe.data.boxes}
    try:
        figures = verb(model, train_source(recipe), settings, out=out, resume=resume, **options)
    except TosaError:
        if processes.is_main() and not (out / IMPACT).exists():
            runs.discard(out)  # nothing was done yet
        raise
    model = with_mean(model, recipe, progress)
    results = {"stage": name, "run": str(out), **figures, "flops": cost_of(model, recipe, progress)}
    if before is not None:
        warn_of_other_cost(before, results["flops"])
    if name == "finetune" and is_whole(model):
        model = as_it_is(model)
    if processes.is_main():
        keep_run(model, out, results)
        _tidy(out)
    processes.join(device)
    return results


def _tidy(run: Path) -> None:
    """What a training needs no more once it is done, gone; and what a kill right after it kept from being written."""
    if not (run / "report.md").exists():
        write_report(run)
    for leftover in (CHECKPOINT, f"{CHECKPOINT}.part"):
        shutil.rmtree(run / leftover, ignore_errors=True)
    (run / runs.SOURCE).unlink(missing_ok=True)


def keep_run(model: nn.Module, out: Path, results: dict) -> None:
    """A finished run, with its report, that later commands find."""
    runs.save(model, out, stage=results["stage"], results=results)
    write_report(out)
    runs.remember(out)
