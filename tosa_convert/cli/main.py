"""The command line: parse, call a verb, print. No logic lives here."""

import contextlib
import logging
import os
import shlex
import signal
import sys
import threading
import traceback
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

# Threads that wait for each other by spinning make small models several times slower where processors are shared, as in
# virtual machines. Before torch is imported, which reads it once; a choice of the user's stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tosa_convert.base.errors import TosaError, TosaWarning, UsageError, gist, is_out_of_memory
from tosa_convert.cli.bench import bench
from tosa_convert.cli.dense import source_with, takes_head, takes_maps
from tosa_convert.cli.export import export
from tosa_convert.cli.inspection import doctor, features, flops, models, report, show_patches
from tosa_convert.cli.options import (
    Checkpoint,
    DataOption,
    Device,
    ImgSize,
    Json,
    Labels,
    NumClasses,
    Seed,
    Source,
    pick_source,
)
from tosa_convert.cli.output import bar, print_json, say, show
from tosa_convert.cli.parsing import at_least, plain
from tosa_convert.cli.plan import compare, plan
from tosa_convert.cli.push import push
from tosa_convert.cli.recipes import recipes_app
from tosa_convert.cli.training import distill, finetune, run

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
for command in (distill, finetune, run, export, flops, features, report, models, doctor, push):
    app.command()(command)


def _version(asked: bool) -> None:
    if asked:
        from tosa_convert import __version__

        print(f"tosa-convert {__version__}")
        raise typer.Exit


@app.callback()
def _top(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """Make pretrained Vision Transformers token-selective: plan, distill, fine-tune, measure, export."""


class Format(StrEnum):
    npy = "npy"
    png = "png"


@app.command(name="eval")
@takes_head
@takes_maps
def evaluate(
    source: Source = None,
    data: DataOption = None,
    map_options: dict | None = None,
    new_head: dict | None = None,
    checkpoint: Checkpoint = None,
    num_classes: NumClasses = None,
    img_size: ImgSize = None,
    batch_size: Annotated[int, typer.Option(help="images per forward pass", callback=at_least(1))] = 32,
    workers: Annotated[int, typer.Option(help="processes that load images", callback=at_least(0))] = 0,
    seed: Annotated[int, typer.Option(help="seed of the random selection", callback=at_least(0))] = 0,
    device: Device = None,
    control: Annotated[bool, typer.Option(help="also measure random selection at the same ratio")] = True,
    labels: Labels = True,
    flip: Annotated[bool, typer.Option("--flip", help="take the mean of maps of images and their mirrors")] = False,
    predictions: Annotated[
        Path | None, typer.Option(help="folder to write the model's maps to", show_default=False)
    ] = None,
    format_: Annotated[
        Format | None,
        typer.Option("--format", help="of these maps; png has 16 bits, of depth 1/256 metres", show_default="npy"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure what the model is for (top-1, depth, masks) where there are labels, and agreement with the original."""
    from tosa_convert.workflows import pipeline as stages

    if format_ and predictions is None:
        raise UsageError(
            "--format is that of the maps that --predictions FOLDER writes; give a folder, or leave it out"
        )
    results = stages.eval_stage(
        pick_source(source),
        source_with(data, map_options),
        img_size=img_size,
        head={**new_head, **plain({"checkpoint": checkpoint, "num_classes": num_classes})},
        flip=flip,
        predictions=predictions,
        format=format_.value if format_ else "npy",
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
    # What asks a program to end (docker stop, systemd, timeout) is as Ctrl-C: checkpoints are kept, leftovers go.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
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
        if is_out_of_memory(error):
            _fail(f"out of memory: use a smaller batch or smaller images ({gist(error)})", 1, debug)
        _fail(
            f"{type(error).__name__}: {gist(error)}; add --debug for the traceback, and report it if it persists",
            1,
            debug,
        )


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    Console(stderr=True).print(Text.assemble(("error:", "bold red"), f" {message}"), soft_wrap=True)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
