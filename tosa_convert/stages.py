"""The stages of the work on files: each takes a recipe or a run, and leaves a run directory."""

import copy
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from tosa_convert import processes, runs
from tosa_convert.benching import BenchSettings, bench
from tosa_convert.comparing import compare, labelled_sample, mean_figures
from tosa_convert.data import SCENES, built_in_photos, read_picture
from tosa_convert.distillation import check_distillable, distill
from tosa_convert.errors import TosaError, UsageError
from tosa_convert.evaluation import evaluate, random_control
from tosa_convert.export import FAILED, FILE, FailedCheckError, export_onnx
from tosa_convert.features import write_features
from tosa_convert.files import check_writable, read_json, write_json, write_text
from tosa_convert.finetuning import finetune, outputs_of
from tosa_convert.loading import load, original_of
from tosa_convert.looking import look, pixels
from tosa_convert.machine import machine
from tosa_convert.macs import flops
from tosa_convert.origin import preprocessing_of
from tosa_convert.planning import find_plan
from tosa_convert.prices import time_models
from tosa_convert.progress import Progress
from tosa_convert.recipe import Recipe, read_recipe
from tosa_convert.report import compare_table, percent, write_report
from tosa_convert.settings import DistillSettings, ExportSettings, FinetuneSettings
from tosa_convert.surgery import convert, is_converted, original
from tosa_convert.train import CHECKPOINT


def distill_stage(recipe: Recipe, out: Path, *, resume=False, device=None, progress: Progress | None = None) -> dict:
    """Load, convert, distill; a run in ``out``. A run that is finished already is only reported on."""
    model = _converted(recipe)
    check_distillable(model)
    return _train_stage("distill", model, recipe, out, resume, device, progress)


def convert_stage(recipe: Recipe, out: Path, *, resume=False, device=None) -> dict:
    """Load and convert, for what needs no training; a run in ``out``."""
    if processes.is_main() and not (resume and runs.is_run(out)):
        model = _converted(recipe)
        runs.prepare(out, resume)
        resolved = recipe.model_copy(update={"convert": model.tosa_config})
        write_text(out / "recipe.yaml", resolved.to_yaml())
        results = {"stage": "convert", "run": str(out), "flops": flops(model).to_dict()}
        _keep(model, out, results)
    processes.join(device)
    return read_json(out / "config.json")["results"]


def finetune_stage(source: str, recipe: Recipe, out: Path, *, resume=False, device=None, progress=None) -> dict:
    """Fine-tune a run, or a model converted as the recipe says, into a new run in ``out``."""
    model = load(source, img_size=recipe.img_size) if runs.is_run(source) else _converted(recipe)
    if not is_converted(model):
        convert(model, recipe.convert)
    return _train_stage("finetune", model, recipe, out, resume, device, progress)


def run_recipe(recipe: Recipe, out: Path, *, resume=False, device=None, progress=None, report: Callable) -> dict:
    """Every stage that the recipe has, each into a folder of ``out`` named after it.

    Trained runs are evaluated on ``data: eval``. ``report(stage, results)`` is called after each
    stage. With ``resume`` finished stages are not run again.
    """
    stages = [name for name in ("distill", "finetune", "export") if getattr(recipe, name) is not None]
    if stages in ([], ["export"]):
        if recipe.convert.score == "attention":
            raise UsageError(
                "the recipe trains nothing, and score attention has to be taught; add distill: or finetune:"
            )
        stages = ["convert", *stages]
    if processes.is_main():
        runs.prepare(out, resume)
        write_text(out / "recipe.yaml", recipe.to_yaml())
    results, options = {}, {"resume": resume, "device": device, "progress": progress}
    run = None
    for name in stages:
        if name == "convert":
            run, results[name] = out / name, convert_stage(recipe, out / name, resume=resume, device=device)
        elif name == "distill":
            run, results[name] = out / name, distill_stage(recipe, out / name, **options)
        elif name == "finetune":
            source = str(run or recipe.model)
            run, results[name] = out / name, finetune_stage(source, recipe, out / name, **options)
        elif processes.is_main():
            results[name] = export_stage(run, recipe.export, recipe.data.eval or recipe.data.train, progress=progress)
        if processes.is_main():
            report(name, results[name])
            if name != "export" and recipe.data.eval is not None:
                results[f"eval {name}"] = eval_stage(
                    str(run),
                    recipe.data.eval,
                    device=device,
                    progress=progress,
                    **({} if name == "convert" else _reading(getattr(recipe, name))),
                )
                report("eval", results[f"eval {name}"])
        processes.join(device)
    return results


def eval_stage(source: str, data: str | None, *, img_size=None, control=True, seed=0, progress=None, **options) -> dict:
    """A model, or a run's model beside its original and the random-selection control."""
    model = load(source, img_size=img_size)
    models: dict[str, nn.Module] = {"converted" if is_converted(model) else "model": model}
    before = _original(model)
    if before is not None:
        models = {"original": before, **models}
    if control and is_converted(model) and model.tosa_config.score != "random":
        models["random selection"] = random_control(model, seed)
    reference = "original" if before is not None else None
    results = evaluate(models, data, reference=reference, progress=progress, **options)
    if runs.is_run(source):
        runs.append_metrics(Path(source), stage="eval", **results)
        write_report(Path(source))
    return results


def export_stage(
    source: str | Path, settings: ExportSettings, data: str | None, *, out=None, img_size=None, progress=None
) -> dict:
    """ONNX and its check, beside the run unless ``out`` says otherwise."""
    model = load(source, img_size=img_size)
    folder = Path(out) if out else Path(source)
    try:
        check = export_onnx(model, folder, data, settings, original=_original(model), progress=progress)
    except FailedCheckError as error:
        _note_export(Path(source), out, {"file": str(folder / FAILED), **error.check.to_dict()})
        raise
    results = {"file": str(folder / FILE), **check.to_dict()}
    _note_export(Path(source), out, results)
    return results


def bench_stage(
    source: str,
    options: dict,
    against: list[str],
    settings: BenchSettings,
    *,
    out=None,
    device=None,
    progress=None,
) -> dict:
    """A run, or a model converted with ``options``, timed beside its original and ``against``.

    Leaves ``bench.json`` and ``bench.png`` beside the run unless ``out`` says otherwise. Weights
    are not needed: what is not a run gets random ones.
    """
    from tosa_convert.pictures import speedup_picture  # matplotlib, which no other stage needs

    model = load(source, pretrained=False)
    if options and is_converted(model):
        raise UsageError("a run's layers, ratio and scores are fixed; leave the options out, or name the model")
    if not is_converted(model):
        convert(model, **options)
    models = {"original": original(model), "converted": model}
    for name in against:
        if name in models:
            raise UsageError(f"--against {name}: this name is timed already; name each model once")
        models[name] = load(name, pretrained=False)
    folder = Path(out) if out else Path(source)
    check_writable(folder)
    results = {"source": source, "convert": model.tosa_config.model_dump()}
    results |= bench(models, settings, device=device, progress=progress)
    if results["cases"]:
        speedup_picture(results, folder / "bench.png")
    write_json(folder / "bench.json", results)
    if out is None:
        write_report(folder)
    return {**results, "file": str(folder / "bench.json"), "picture": str(folder / "bench.png")}


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


def show_stage(source: str, options: dict, files: list[Path], out: Path, *, checkpoint=None, img_size=None) -> dict:
    """Which patches attend: a picture of each file, or of the built-in scenes, in each selective layer."""
    from tosa_convert.pictures import views_picture

    model = _loaded_or_converted(source, options, checkpoint, img_size)
    preprocessing = preprocessing_of(model)
    files = files or [path for path in sorted(built_in_photos().iterdir()) if path.stem in SCENES]
    images = torch.stack([read_picture(path, preprocessing) for path in files])
    views = [look(model, image[None])[0] for image in images]
    if not views[0]:
        raise UsageError(f"{source} skips nothing: all its ratios are 1")
    names = [path.name for path in files]
    views_picture([pixels(image, preprocessing) for image in images], views, names, out)
    patches = views[0][0].attended.size
    shares = {view.layer: float(view.attended.sum() / patches) for view in views[0]}
    return {"picture": str(out), "images": names, "attended": shares}


def features_stage(source: str, data: str | None, out: Path, *, device=None, progress=None, **options) -> dict:
    """Patch and class features of a folder of pictures, in one file."""
    model = load(source, checkpoint=options.pop("checkpoint"), img_size=options.pop("img_size"))
    return {"source": source, **write_features(model, data, out, device=device, progress=progress, **options)}


def report_stage(source: str, out: Path | None, *, progress: Progress | None = None) -> dict:
    """All that is known of a run in one HTML file; the pictures are drawn anew."""
    from tosa_convert.html_report import write_html

    folder = Path(source)
    if not runs.is_run(folder):
        raise UsageError(f"{source} is no run; name the folder of one")
    file = out or folder / "report.html"
    write_html(folder, load(source), file, progress or Progress())
    return {"run": source, "file": str(file)}


def _loaded_or_converted(source: str, options: dict, checkpoint, img_size) -> nn.Module:
    """A run's model, or one converted on the spot."""
    model = load(source, checkpoint=checkpoint, img_size=img_size)
    if options and is_converted(model):
        raise UsageError("a run's layers, ratio and scores are fixed; leave the options out, or name the model")
    return convert(model, **options) if options else model


def _keep(model: nn.Module, out: Path, results: dict) -> None:
    """A finished run, with its report, that later commands find."""
    runs.save(model, out, stage=results["stage"], results=results)
    write_report(out)
    runs.remember(out)


def _reading(settings) -> dict:
    return {"batch_size": settings.batch_size, "workers": settings.workers}


def _note_export(source: Path, out: Path | None, results: dict) -> None:
    """Keep the result of an export in its run's metrics and report, whether it passed or not."""
    if out is None and runs.is_run(source):
        runs.append_metrics(source, stage="export", **results)
        write_report(source)


def _original(model: nn.Module) -> nn.Module | None:
    """What a converted model is measured against, if it can be had and its head is the same."""
    before = original_of(model) if is_converted(model) else None
    return before if before is not None and outputs_of(before) == outputs_of(model) else None


def _converted(recipe: Recipe) -> nn.Module:
    model = load(recipe.model, checkpoint=recipe.checkpoint, img_size=recipe.img_size, num_classes=recipe.num_classes)
    return convert(model, recipe.convert)


def _check_same_job(recipe: Recipe, path: Path) -> None:
    """A resumed run goes on with what it was begun with, or its result would be of neither job."""
    if not path.exists():
        return
    ours, theirs = (_flatten(each.model_dump(mode="json")) for each in (recipe, read_recipe(path)))
    changed = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    if changed:
        raise UsageError(
            f"{path.parent} was begun with other settings ({', '.join(changed[:4])}); resume it with the same command, "
            "or start anew with another --out"
        )


def _flatten(content: dict, before: str = "") -> dict:
    """Nested dictionaries as one, with dotted keys."""
    flat = {}
    for key, value in content.items():
        name = f"{before}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _train_stage(name: str, model: nn.Module, recipe: Recipe, out: Path, resume: bool, device, progress) -> dict:
    settings: DistillSettings | FinetuneSettings = getattr(recipe, name)
    verb = {"distill": distill, "finetune": finetune}[name]
    resolved = recipe.model_copy(update={"convert": model.tosa_config})
    if resume:
        _check_same_job(resolved, out / "recipe.yaml")
    processes.join(device)
    if resume and runs.is_run(out):
        return read_json(out / "config.json")["results"]
    if processes.is_main():
        runs.prepare(out, resume)
        write_text(out / "recipe.yaml", resolved.to_yaml())
    processes.join(device)
    options = {"seed": recipe.seed, "device": device, "progress": progress}
    try:
        figures = verb(model, recipe.data.train, settings, out=out, resume=resume, **options)
    except TosaError:
        if processes.is_main():
            runs.discard(out)  # nothing was done yet
        raise
    results = {"stage": name, "run": str(out), **figures, "flops": flops(model).to_dict()}
    if processes.is_main():
        _keep(model, out, results)
        for leftover in (CHECKPOINT, f"{CHECKPOINT}.part"):
            shutil.rmtree(out / leftover, ignore_errors=True)
    processes.join(device)
    return results
