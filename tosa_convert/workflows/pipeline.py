"""The stages of the work on files: each takes a recipe or a run, and writes a run directory."""

import warnings
from collections.abc import Callable
from pathlib import Path

from torch import nn

from tosa_convert.base import distributed as processes
from tosa_convert.base.errors import InterruptedTrainingError, TosaError, TosaWarning, UsageError
from tosa_convert.base.files import check_writable, read_json, write_json, write_text
from tosa_convert.base.progress import Progress
from tosa_convert.config.bench import BenchSettings
from tosa_convert.config.recipe import Recipe
from tosa_convert.config.settings import ExportSettings
from tosa_convert.export.onnx import FILE, FailedCheckError, export_onnx, exported
from tosa_convert.export.predictions import check_predictable, write_predictions
from tosa_convert.measure.benchmark import bench
from tosa_convert.measure.evaluation import evaluate, is_control, random_control
from tosa_convert.methods.score import Score
from tosa_convert.models.outputs import outputs_of
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.reporting.run_texts import write_report
from tosa_convert.runs import folder as runs
from tosa_convert.runs.loading import load, original_of, run_at
from tosa_convert.runs.lock import writes_alone
from tosa_convert.runs.metrics_log import append_metrics
from tosa_convert.selective.conversion import convert, is_converted, is_whole, original
from tosa_convert.selective.selection import keeps_any_number
from tosa_convert.training.distillation import check_distillable
from tosa_convert.training.engine import CHECKPOINT
from tosa_convert.training.finetuning import check_finetuning
from tosa_convert.workflows.recipe_checks import check_recipe
from tosa_convert.workflows.same_job import OtherJobError, check_same_job
from tosa_convert.workflows.sources import (
    check_labels,
    check_measured,
    converted,
    eval_source,
    to_finetune,
    to_measure,
    train_source,
)
from tosa_convert.workflows.thresholds import (
    check_thresholds,
    cost_of,
    on_these_images,
    with_mean,
)
from tosa_convert.workflows.train_stage import keep_run, train_stage


@writes_alone
def distill_stage(
    recipe: Recipe, out: Path, *, first=False, resume=False, device=None, progress: Progress | None = None
) -> dict:
    """Load, convert, distill; a run in ``out``. A run that is finished already is only reported on.

    Args:
        first: the recipe's other stages follow, so that what they would refuse is refused now.
    """
    model = converted(recipe)
    check_distillable(model)
    if first:
        check_labels(model, recipe)
    if first and recipe.finetune is not None:
        labels = {"masks": recipe.data.masks, "boxes": recipe.data.boxes}
        check_finetuning(model, train_source(recipe), recipe.finetune, **labels)
    return train_stage("distill", model, recipe, out, resume, device, progress)


@writes_alone
def convert_stage(recipe: Recipe, out: Path, *, resume=False, device=None, progress=None) -> dict:
    """Load and convert, for what needs no training; a run in ``out``."""
    if processes.is_main():
        model = converted(recipe)
        check_thresholds(model, recipe)
        check_labels(model, recipe)
        resolved = recipe.model_copy(update={"convert": model.tosa_config})
        if resume:
            check_same_job(resolved, out / "recipe.yaml", "convert")
        if not (resume and runs.is_run(out)):
            runs.prepare(out, resume)
            write_text(out / "recipe.yaml", resolved.to_yaml())
            model = with_mean(model, recipe, progress)
            results = {"stage": "convert", "run": str(out), "flops": cost_of(model, recipe, progress)}
            keep_run(model, out, results)
    processes.join(device)
    return read_json(out / "config.json")["results"]


@writes_alone
def finetune_stage(
    source: str, recipe: Recipe, out: Path, *, first=False, resume=False, device=None, progress=None
) -> dict:
    """Fine-tune a run, or a model converted as the recipe says, into a new run in ``out``; ``first`` as with
    :func:`distill_stage`."""
    run = run_at(source)
    model, fresh = to_finetune(source, run, recipe)
    score = model.tosa_config.part(Score)
    if fresh and score.distilled() and not is_whole(model):
        raise UsageError(
            f"score {model.tosa_config.score} would choose at random: distill {source} with the same options first "
            "(distill: in a recipe), then finetune that run"
        )
    if first:
        check_labels(model, recipe)
    return train_stage("finetune", model, recipe, out, resume, device, progress, run)


@writes_alone
def run_recipe(recipe: Recipe, out: Path, *, resume=False, device=None, progress=None, report: Callable) -> dict:
    """Every stage that the recipe has, each into a folder of ``out`` named after it.

    Trained runs are evaluated on ``data: eval``. ``report(stage, results)`` is called after each
    stage. With ``resume`` finished stages are not run again.
    """
    stages = [name for name in ("distill", "finetune", "export") if getattr(recipe, name) is not None]
    if stages in ([], ["export"]):
        stages = ["convert", *stages]
    if resume and (runs.is_run(out) or (out / CHECKPOINT).exists()):
        raise UsageError(
            f"{out} is a stage of a run, not the run; resume its parent folder: --out {out.parent} --resume"
        )
    check_recipe(recipe)
    check_measured(recipe)
    file = out / "recipe.yaml"
    before = file.read_text(encoding="utf-8") if file.exists() else None
    if processes.is_main():
        runs.prepare(out, resume)
        write_text(file, recipe.to_yaml())
    try:
        return _stage_by_stage(stages, recipe, out, resume, device, progress, report)
    except BaseException as error:
        if processes.is_main():
            if before is not None and isinstance(error, OtherJobError):
                write_text(file, before)
            runs.discard(out)
        raise


def _stage_by_stage(
    stages: list[str], recipe: Recipe, out: Path, resume: bool, device: str | None, progress, report: Callable
) -> dict:
    results: dict = {}
    options = {"resume": resume, "device": device, "progress": progress}
    run = None
    for name in stages:
        if name == "convert":
            run, results[name] = out / name, convert_stage(recipe, out / name, **options)
        elif name in ("distill", "finetune"):
            source = str(run or recipe.model)
            try:
                results[name] = (
                    distill_stage(recipe, out / name, first=True, **options)
                    if name == "distill"
                    else finetune_stage(source, recipe, out / name, first=name == stages[0], **options)
                )
            except InterruptedTrainingError as error:  # to go on with the run, not with the stage
                raise InterruptedTrainingError(str(error).replace(str(out / name), str(out))) from None
            run = out / name
        elif processes.is_main():
            results[name] = export_stage(
                run, recipe.export, eval_source(recipe) or train_source(recipe), progress=progress
            )
        if processes.is_main():
            report(name, results[name])
            if name != "export" and recipe.data.eval is not None:
                results[f"eval {name}"] = eval_stage(
                    str(run),
                    eval_source(recipe),
                    labels=recipe.data.eval_labels,
                    seed=recipe.seed,
                    device=device,
                    progress=progress,
                    **({} if name == "convert" else _reading(getattr(recipe, name))),
                )
                report("eval", results[f"eval {name}"])
        processes.join(device)
    return results


def eval_stage(
    source: str,
    data: str | None,
    *,
    img_size=None,
    head: dict | None = None,
    predictions: Path | None = None,
    format: str = "npy",
    control=True,
    seed=0,
    progress=None,
    **options,
) -> dict:
    """A model, or a run's model with its original and the random-selection control; its maps are written to
    ``predictions``."""
    model = load(source, img_size=img_size, **(head or {}))
    if predictions is not None:
        check_predictable(model, predictions)
    models: dict[str, nn.Module] = {"converted" if is_converted(model) else "model": model}
    before = _original(model)
    if before is not None:
        models = {"original": before, **models}
    if control and is_converted(model) and not is_control(model):
        models["random selection"] = random_control(model, seed)
    reference = "original" if before is not None else None
    results = evaluate(models, data, reference=reference, progress=progress, **options)
    if predictions is not None:
        how = {"flip": options.get("flip", False), "device": options.get("device"), "progress": progress}
        results["predictions"] = write_predictions(model, data, predictions, format, **how)
    elif not any(results["models"].values()):
        raise UsageError(
            f"nothing can be measured: {results['data']} has no labels that the model can learn from, and there is no "
            "original to compare it with; give labelled images, or a converted model"
        )
    if keeps_any_number(model):
        results |= on_these_images(model, source, data, progress)
    _note(source, "eval", results)
    return results


def export_stage(
    source: str | Path, settings: ExportSettings, data: str | None, *, out=None, img_size=None, head=None, progress=None
) -> dict:
    """ONNX and its check, in the run unless ``out`` says otherwise."""
    model = load(source, img_size=img_size, **(head or {}))
    folder = Path(out) if out else Path(source)
    try:
        check = export_onnx(model, folder, data, settings, original=_original(model), progress=progress)
    except FailedCheckError as error:
        if _same_place(folder, source):
            _note(source, "export", error.results)
        raise
    results = {"file": str(folder / FILE), **check.to_dict()}
    if _same_place(folder, source):
        _note(source, "export", results)
    return results


def bench_stage(
    source: str,
    options: dict,
    against: list[str],
    settings: BenchSettings,
    *,
    data: str | None = None,
    images: int = 24,
    out=None,
    device=None,
    progress=None,
) -> dict:
    """A run, or a model converted with ``options``, timed in turn with its original and ``against``.

    Writes ``bench.json`` and ``bench.png`` to the run unless ``out`` says otherwise. A model that is not a run gets
    random weights, unless the number of tokens depends on them. Of a run that was exported its own ``model.onnx`` is
    timed.
    """
    from tosa_convert.reporting.plots import speedup_plot  # matplotlib, which no other stage needs

    model = to_measure(source, options)
    if not is_converted(model):
        convert(model)
    models = {"original": original(model), "converted": model}
    for name in against:
        if name in models:
            raise UsageError(f"--against {name}: this name is timed already; name each model once")
        models[name] = load(name, pretrained=False)
    folder = Path(out) if out else Path(source)
    check_writable(folder)
    results = {"source": source, "convert": model.tosa_config.model_dump()}
    places = {"converted": source, **{name: name for name in against}}
    size = preprocessing_of(model).size
    files = {name: found for name, place in places.items() if (found := exported(Path(place), size))}
    results |= bench(models, settings, files=files, data=data, images=images, device=device, progress=progress)
    write_json(folder / "bench.json", results)  # before the plot: figures count for more
    if results["cases"]:
        speedup_plot(results, folder / "bench.png")
    if _same_place(folder, source) and runs.is_run(folder):
        write_report(folder)
    return {**results, "file": str(folder / "bench.json"), "plot": str(folder / "bench.png")}


def _reading(settings) -> dict:
    return {"batch_size": settings.batch_size, "workers": settings.workers}


def _note(source: str | Path, stage: str, results: dict) -> None:
    """Keep results in the metrics and the report of their run, if they are of one. They are given in any case."""
    if not runs.is_run(source):
        return
    try:
        append_metrics(Path(source), stage=stage, **results)
        write_report(Path(source))
    except TosaError as error:
        warnings.warn(f"the run does not keep these figures: {error}", TosaWarning, stacklevel=2)


def _same_place(folder: Path, source: str | Path) -> bool:
    return folder.resolve() == Path(source).resolve()


def _original(model: nn.Module) -> nn.Module | None:
    """What a converted model is measured against, if it can be had and its head is the same."""
    before = original_of(model) if is_converted(model) else None
    return before if before is not None and outputs_of(before) == outputs_of(model) else None
