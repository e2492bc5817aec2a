"""The command line: parse, call a verb, print. No logic lives here."""

import contextlib
import logging
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

# Threads that wait for each other by spinning make small models several times slower where processors are shared, as in
# virtual machines. Before torch is imported, which reads it once; a choice of the user's stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tosa_convert.base.errors import TosaError, TosaWarning, UsageError
from tosa_convert.cli.bench import bench
from tosa_convert.cli.conversion import takes_conversion
from tosa_convert.cli.inspection import features, flops, models, report, show_patches
from tosa_convert.cli.options import (
    AugmentOption,
    BatchSize,
    Checkpoint,
    DataOption,
    Device,
    Epochs,
    ImgSize,
    Json,
    Labels,
    Lr,
    Model,
    NumClasses,
    Out,
    PrecisionOption,
    RecipeOption,
    Resume,
    Seed,
    Source,
    Steps,
    Workers,
    is_run,
    make_recipe,
    out_folder,
    pick_source,
    stem,
)
from tosa_convert.cli.output import bar, print_json, say, say_data, show
from tosa_convert.cli.parsing import at_least
from tosa_convert.cli.plan import compare, plan
from tosa_convert.cli.recipes import recipes_app

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Make pretrained Vision Transformers token-selective: plan, distill, fine-tune, measure, export.",
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
    """Make pretrained Vision Transformers token-selective: plan, distill, fine-tune, measure, export."""


@app.command()
@takes_conversion
def distill(
    model: Model = None,
    conversion: dict | None = None,
    data: DataOption = None,
    recipe: RecipeOption = None,
    out: Out = None,
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
    examples: Annotated[
        int | None,
        typer.Option(help="images to work out token impact on", show_default="256", callback=at_least(1)),
    ] = None,
    device: Device = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Convert a model and train its selectors by distillation from the original model. Needs no labels."""
    from tosa_convert.workflows import pipeline as stages

    plan = make_recipe(recipe, "distill", locals())
    folder = out_folder(out, stem(plan.model), resume, device)
    results = stages.distill_stage(plan, folder, resume=resume, device=device, progress=bar(as_json))
    say_data(plan)
    show(results, "training_table", as_json)


@app.command()
@takes_conversion
def finetune(
    run: Source = None,
    data: DataOption = None,
    recipe: RecipeOption = None,
    out: Out = None,
    conversion: dict | None = None,
    steps: Steps = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Lr = None,
    labels: Annotated[
        float | None, typer.Option(help="weight of the cross-entropy loss on labels", show_default="1 with labels")
    ] = None,
    logits: Annotated[
        float | None,
        typer.Option(help="weight of the loss on the original's logits", show_default="1 without labels"),
    ] = None,
    features: Annotated[
        float | None,
        typer.Option(help="weight of the loss on the original's tokens", show_default="1 without labels"),
    ] = None,
    cut: Annotated[
        float | None, typer.Option(help="weight of the token cut loss", show_default="1 with method idle")
    ] = None,
    consistency: Annotated[
        float | None, typer.Option(help="weight of mctf's second pass", show_default="1 with method mctf")
    ] = None,
    gates: Annotated[
        float | None,
        typer.Option(help="weight of spa's loss on selection labels", show_default="0.01 with method spa"),
    ] = None,
    masks: Annotated[
        str | None,
        typer.Option(
            help="selection labels: a folder of PNG masks named like the images",
            show_default="the original's attention",
        ),
    ] = None,
    boxes: Annotated[
        str | None, typer.Option(help="selection labels: boxes in a COCO file", show_default=False)
    ] = None,
    teacher: Annotated[bool, typer.Option("--teacher", help="learn from the original alone, without labels")] = False,
    augment: AugmentOption = None,
    precision: PrecisionOption = None,
    workers: Workers = None,
    seed: Seed = None,
    device: Device = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train a run's model to work with its layers selective. The result is a new run.

    A model that is not a run is converted first, by --method tome, --score random and so on.
    """
    from tosa_convert.workflows import pipeline as stages

    if teacher and labels:
        raise UsageError("--teacher learns without labels, and --labels gives them a weight; leave out one of the two")
    labels = 0.0 if teacher else labels
    source = pick_source(run)
    trained = is_run(source)
    stages.refuse_options_of_a_run(trained, conversion)
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
    from tosa_convert.base import distributed as processes
    from tosa_convert.config.recipe import Recipe, find_recipe, read_recipe
    from tosa_convert.config.validation import build
    from tosa_convert.workflows import pipeline as stages

    path = find_recipe(recipe)
    plan = read_recipe(path)
    if seed is not None:
        plan = build(Recipe, {**plan.model_dump(exclude_unset=True), "seed": seed})
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
    batch_size: Annotated[int, typer.Option(help="images per forward pass", callback=at_least(1))] = 32,
    workers: Annotated[int, typer.Option(help="processes that load images", callback=at_least(0))] = 0,
    seed: Annotated[int, typer.Option(help="seed of the random selection", callback=at_least(0))] = 0,
    device: Device = None,
    control: Annotated[bool, typer.Option(help="also measure random selection at the same ratio")] = True,
    labels: Labels = True,
    as_json: Json = False,
) -> None:
    """Measure top-1 on labelled images, and agreement with the original on any images."""
    from tosa_convert.workflows import pipeline as stages

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
    threshold: Annotated[float, typer.Option(help="lowest agreement with torch at which the export passes")] = 0.99,
    images: Annotated[int, typer.Option(help="most images in the check", callback=at_least(1))] = 512,
    any_size: Annotated[bool, typer.Option("--any-size", help="accept images of any size, if the model does")] = False,
    labels: Labels = True,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; the export and its check run on the CPU either way")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write ONNX, and check it in ONNX Runtime against torch on real images."""
    from tosa_convert.base.distributed import pick_device
    from tosa_convert.config.settings import ExportSettings
    from tosa_convert.config.validation import build
    from tosa_convert.workflows import pipeline as stages

    pick_device(device)
    source = pick_source(source)
    typed = {"opset": opset, "threshold": threshold, "images": images, "labels": labels, "any_size": any_size}
    settings = build(ExportSettings, typed)
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
    """Try everything in minutes: plan, distill, fine-tune, evaluate, export and time a small ViT. Needs no network."""
    from tosa_convert.workflows.quickstart import run_quickstart

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
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao, where installed, makes it warn
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
