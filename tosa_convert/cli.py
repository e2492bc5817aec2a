"""The command line: parse, call a verb, print. No logic lives here."""

import contextlib
import os
import shlex
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from tosa_convert.cli_bench import bench
from tosa_convert.cli_look import features, flops, models, report, show_patches
from tosa_convert.cli_options import (
    AugmentOption,
    BatchSize,
    BypassOption,
    Checkpoint,
    DataOption,
    Device,
    Epochs,
    Hidden,
    ImgSize,
    Json,
    Kernel,
    Labels,
    Layers,
    Lr,
    MethodOption,
    Model,
    NumClasses,
    Out,
    PrecisionOption,
    Ratio,
    RecipeOption,
    Resume,
    Rows,
    ScheduleOption,
    ScoreOption,
    Seed,
    SelectionOption,
    Source,
    Steps,
    Workers,
    convert_options,
    is_run,
    make_recipe,
    out_folder,
    pick_source,
    stem,
)
from tosa_convert.cli_output import bar, print_json, say, say_data, show
from tosa_convert.cli_plan import compare, plan
from tosa_convert.cli_recipes import recipes_app
from tosa_convert.errors import TosaError, TosaWarning, UsageError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Make pretrained Vision Transformers token-selective: distill, fine-tune, measure, export.",
    epilog="Add --debug to any command for the traceback of an error.",
)
app.add_typer(recipes_app, name="recipes")
app.command()(bench)
app.command()(plan)
app.command()(compare)
app.command(name="show")(show_patches)
for command in (flops, features, report, models):
    app.command()(command)


def _version(asked: bool) -> None:
    if asked:
        from tosa_convert import __version__

        print(f"tosa-convert {__version__}")
        raise typer.Exit


@app.callback()
def _top(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """Make pretrained Vision Transformers token-selective: distill, fine-tune, measure, export."""


@app.command()
def distill(
    model: Model = None,
    layers: Layers = None,
    ratio: Ratio = None,
    data: DataOption = None,
    recipe: RecipeOption = None,
    out: Out = None,
    selection: SelectionOption = None,
    rows: Rows = None,
    hidden: Hidden = None,
    kernel: Kernel = None,
    checkpoint: Checkpoint = None,
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    steps: Steps = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Lr = None,
    augment: AugmentOption = None,
    precision: PrecisionOption = None,
    workers: Workers = None,
    seed: Seed = None,
    device: Device = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Convert a model and train its selectors by distillation from the model itself. Needs no labels."""
    from tosa_convert import stages

    plan = make_recipe(recipe, "distill", locals())
    folder = out_folder(out, stem(plan.model), resume, device)
    results = stages.distill_stage(plan, folder, resume=resume, device=device, progress=bar(as_json))
    say_data(plan)
    show(results, "training_table", as_json)


@app.command()
def finetune(
    run: Source = None,
    data: DataOption = None,
    recipe: RecipeOption = None,
    out: Out = None,
    layers: Layers = None,
    ratio: Ratio = None,
    method: MethodOption = None,
    score: ScoreOption = None,
    bypass: BypassOption = None,
    schedule: ScheduleOption = None,
    selection: SelectionOption = None,
    rows: Rows = None,
    steps: Steps = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Lr = None,
    labels: Annotated[
        float | None, typer.Option(help="weight of the cross-entropy", show_default="1 with labels")
    ] = None,
    logits: Annotated[
        float | None, typer.Option(help="weight of the original's logits", show_default="1 without labels")
    ] = None,
    features: Annotated[
        float | None, typer.Option(help="weight of the original's tokens", show_default="1 without labels")
    ] = None,
    cut: Annotated[
        float | None, typer.Option(help="weight of the token cut loss", show_default="1 with method idle")
    ] = None,
    augment: AugmentOption = None,
    precision: PrecisionOption = None,
    workers: Workers = None,
    seed: Seed = None,
    device: Device = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train a run's model to work with its layers selective. The result is a new run.

    Given a model instead of a run, it is converted first (--method tome, --score random, …).
    """
    from tosa_convert import stages

    source = pick_source(run)
    trained = is_run(source)
    if trained and convert_options(locals()):
        raise UsageError(
            "how a run was converted is fixed; leave these options out, or convert the model anew with them"
        )
    known = Path(source) / "recipe.yaml"  # a run saved from Python has none
    options = {**locals(), "model": None if trained and known.exists() else source}
    plan = make_recipe(recipe or (str(known) if trained and known.exists() else None), "finetune", options)
    folder = out_folder(out, f"{stem(source)}-finetuned", resume, device)
    results = stages.finetune_stage(source, plan, folder, resume=resume, device=device, progress=bar(as_json))
    say_data(plan)
    show(results, "training_table", as_json)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="a recipe file, or the name of a built-in one")],
    out: Out = None,
    seed: Seed = None,
    device: Device = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Run all stages of a recipe."""
    from tosa_convert import processes, stages
    from tosa_convert.config import build_config
    from tosa_convert.recipe import Recipe, find_recipe, read_recipe

    path = find_recipe(recipe)
    plan = read_recipe(path)
    if seed is not None:
        plan = build_config(Recipe, {**plan.model_dump(exclude_unset=True), "seed": seed})
    folder = out_folder(out, path.stem, resume, device)

    def report(stage: str, results: dict) -> None:
        tables = {"convert": "convert_table", "export": "export_table", "eval": "eval_table"}
        if not as_json:
            show(results, tables.get(stage, "training_table"), False)

    results = stages.run_recipe(plan, folder, resume=resume, device=device, progress=bar(as_json), report=report)
    if as_json and processes.is_main():
        print_json(results)


@app.command(name="eval")
def evaluate(
    source: Source = None,
    data: DataOption = None,
    img_size: ImgSize = None,
    batch_size: Annotated[int, typer.Option(help="pictures per forward pass")] = 32,
    workers: Annotated[int, typer.Option(help="processes that read pictures")] = 0,
    seed: Annotated[int, typer.Option(help="of the random selection")] = 0,
    device: Device = None,
    control: Annotated[bool, typer.Option(help="measure random selection at the same ratio too")] = True,
    labels: Labels = True,
    as_json: Json = False,
) -> None:
    """Top-1 on labelled pictures, closeness to the original on any."""
    from tosa_convert import stages

    results = stages.eval_stage(
        pick_source(source),
        data,
        img_size=img_size,
        control=control,
        seed=seed,
        labels=labels,
        progress=bar(as_json),
        batch_size=batch_size,
        workers=workers,
        device=device,
    )
    show(results, "eval_table", as_json)


@app.command()
def export(
    source: Source = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="write ONNX (the only format so far)")] = True,
    data: DataOption = None,
    out: Annotated[Path | None, typer.Option(help="folder for the files", show_default="the run")] = None,
    img_size: ImgSize = None,
    opset: Annotated[int, typer.Option(help="ONNX operator set")] = 20,
    threshold: Annotated[float, typer.Option(help="agreement with torch below which the export fails")] = 0.99,
    images: Annotated[int, typer.Option(help="at most so many pictures in the check")] = 512,
    any_size: Annotated[bool, typer.Option("--any-size", help="for pictures of any size, if the model is")] = False,
    labels: Labels = True,
    as_json: Json = False,
) -> None:
    """Write ONNX and check it in ONNX Runtime on real pictures before anyone ships it."""
    from tosa_convert import stages
    from tosa_convert.config import build_config
    from tosa_convert.settings import ExportSettings

    source = pick_source(source)
    typed = {"opset": opset, "threshold": threshold, "images": images, "labels": labels, "any_size": any_size}
    settings = build_config(ExportSettings, typed)
    if out is None and not is_run(source):
        out = out_folder(None, f"{stem(source)}-onnx", False)
    results = stages.export_stage(source, settings, data, out=out, img_size=img_size, progress=bar(as_json))
    show(results, "export_table", as_json)


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="folder for data and runs")] = Path("tosa-quickstart"),
    seed: Seed = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """All of it in minutes: distill, fine-tune, count, evaluate, export a small ViT on real pictures. No network."""
    from tosa_convert.quickstart import run_quickstart

    def execute(command: list[str]) -> None:
        Console(stderr=as_json).print(Text(f"\n$ tosa-convert {shlex.join(command)}", "bold"), soft_wrap=True)
        with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
            app(command, standalone_mode=False)

    table, results = run_quickstart(out, execute, seed, device)
    print(file=sys.stderr)
    if as_json:
        print_json(results)
    else:
        table.print(Console())


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Exit code 0 only on success, 2 for usage, 1 for failure, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not debug:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", TosaWarning)
    warnings.showwarning = lambda message, *_, **__: say(f"note: {message}")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app(arguments)
    except SystemExit as stop:
        if stop.code == 130:  # Typer's answer to Ctrl-C
            _fail("interrupted", 130, debug)
        raise
    except TosaError as error:
        _fail(str(error), error.exit_code, debug)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _fail(f"{place}{error.strerror or error}; check the path and the free space, or choose another --out", 1, debug)
    except Exception as error:
        gist = " ".join(str(error).split())[:300]
        _fail(f"{type(error).__name__}: {gist}; add --debug for the traceback, and report it if it persists", 1, debug)


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    Console(stderr=True).print(Text.assemble(("error:", "bold red"), f" {message}"), soft_wrap=True)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
