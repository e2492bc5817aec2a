"""The other options that commands share, and how they turn into a recipe."""

import os
import warnings
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tosa_convert.base.errors import TosaWarning, UsageError
from tosa_convert.cli.output import say
from tosa_convert.cli.parsing import at_least, image_size, plain


class Augment(StrEnum):
    crop = "crop"
    flip = "flip"
    none = "none"


class Precision(StrEnum):
    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


MODEL_HELP = "timm name (or its beginning), hf:ORG/NAME, a transformers or timm folder, or a run"
IMAGES = (
    "images: a folder, tar:FILE, wds:SHARDS, hfds:NAME or as a stream hfids:NAME, of classes if each has a folder or a "
    "label; with maps "
    "nyu:ROOT, kitti:ROOT, depth:ROOT or masks:ROOT"
)
Model = Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default=False)]
Source = Annotated[str | None, typer.Argument(help=f"{MODEL_HELP}; left out: the newest run", show_default=False)]
DataOption = Annotated[
    str | None,
    typer.Option(help=IMAGES, show_default="built-in photos"),
]
RecipeOption = Annotated[str | None, typer.Option(help="recipe that the other options override", show_default=False)]
Out = Annotated[Path | None, typer.Option(help="folder for the results", show_default="runs/…")]
Checkpoint = Annotated[
    Path | None, typer.Option(help="weights for a timm name: .safetensors or .pth", show_default=False)
]
ImgSize = Annotated[
    int | None,
    typer.Option(
        help="image side in pixels, or HEIGHTxWIDTH", show_default="the model's", parser=image_size, metavar="SIZE"
    ),
]
NumClasses = Annotated[
    int | None, typer.Option(help="outputs of the head", show_default="the model's", callback=at_least(0))
]
Steps = Annotated[int | None, typer.Option(help="optimiser steps", show_default="100", callback=at_least(1))]
Labels = Annotated[bool, typer.Option(help="take sub-folders as classes")]
Epochs = Annotated[float | None, typer.Option(help="passes over the data, in place of steps", show_default=False)]
BatchSize = Annotated[int | None, typer.Option(help="images per forward pass", show_default="8", callback=at_least(1))]
Lr = Annotated[float | None, typer.Option(help="peak learning rate", show_default="the stage's")]
AugmentOption = Annotated[Augment | None, typer.Option(help="augmentation of the training images", show_default="crop")]
PrecisionOption = Annotated[Precision | None, typer.Option(help="mixed precision", show_default="no")]
Workers = Annotated[int | None, typer.Option(help="processes that load images", show_default="0", callback=at_least(0))]
MeanMacs = Annotated[
    float | None,
    typer.Option(
        help="with thresholds: share of the original's MACs that images take on average; moves the thresholds",
        show_default=False,
    ),
]
Seed = Annotated[int | None, typer.Option(help="random seed", show_default="0", callback=at_least(0))]
Device = Annotated[str | None, typer.Option(help="cpu or cuda", show_default="a GPU if there is one")]
Resume = Annotated[bool, typer.Option("--resume", help="resume the interrupted run in --out")]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON")]


def make_recipe(path: str | None, stage: str, options: dict):
    """The recipe to work by: a file's, with the options of the command over it, ``conversion`` among them."""
    from tosa_convert.config.conversion import ConvertConfig
    from tosa_convert.config.options import over
    from tosa_convert.config.recipe import Recipe, find_recipe, read_recipe
    from tosa_convert.config.settings import DistillSettings, FinetuneSettings
    from tosa_convert.config.validation import build

    base = read_recipe(find_recipe(path)) if path else None
    if base is None and options["model"] is None:
        raise UsageError("name a model, for example: tosa-convert distill deit_tiny (or give a --recipe)")
    plan = base.model_dump(exclude_unset=True) if base else {}
    kind = {"distill": DistillSettings, "finetune": FinetuneSettings}[stage]
    typed = _given(options, kind.model_fields)
    before = dict(plan.get(stage) or {})
    for length, other in (("steps", "epochs"), ("epochs", "steps")):
        if length in typed:
            before.pop(other, None)
    plan[stage] = build(kind, {**before, **typed})
    plan["convert"] = build(ConvertConfig, over(plan.get("convert", {}), options["conversion"]))
    named = {"train": options.get("data"), "masks": options.get("masks"), "boxes": options.get("boxes")}
    beside = options.get("map_options") or {}
    named |= {"list": beside.get("list_file"), "depth_scale": beside.get("depth_scale")}
    given = {name: value for name, value in named.items() if value is not None}
    unused = typed.get("gates") == 0 or typed.get("head_only", False)
    plan["data"] = {**_kept_of_data(plan.get("data") or {}, given, unused), **given}
    plan |= _given(options, ("model", "checkpoint", "img_size", "num_classes", "mean_macs", "seed"))
    return build(Recipe, {**plan, **options.get("new_head", {})})


def _kept_of_data(before: dict, given: dict, unused: bool) -> dict:
    """What holds of a recipe's data beside what is given; ``unused``: without its selection labels."""
    replaced: set[str] = set()
    if "train" in given and not _same_place(given["train"], before.get("train")):  # of other images
        replaced |= {"list", "depth_scale", "masks", "boxes"}
    if unused or given.keys() & {"masks", "boxes"}:  # either is selection labels
        replaced |= {"masks", "boxes"}
    gone = [name for name in ("masks", "boxes") if before.get(name) and name in replaced]
    if gone and not unused and not given.keys() & {"masks", "boxes"}:
        warnings.warn(
            f"--data names other images, so {gone[0]} of {before[gone[0]]} are left out; give --{gone[0]} for these",
            TosaWarning,
            stacklevel=2,
        )
    return {name: value for name, value in before.items() if name not in replaced}


def _same_place(one: str, other: str | None) -> bool:
    return other is not None and os.path.abspath(one) == os.path.abspath(other)


def _given(options: dict, names: Iterable[str]) -> dict:
    return plain({name: options.get(name) for name in names})


def pick_source(source: str | None) -> str:
    """The source that was named, or the newest run."""
    from tosa_convert.runs import folder as runs

    if source is not None:
        return source
    found = str(runs.newest())
    say(f"using the newest run, {found}")
    return found


def is_run(source: str) -> bool:
    """Whether a source is the folder of a finished run."""
    from tosa_convert.runs import folder as runs

    return runs.is_run(source)


def is_converted_run(source: str) -> bool:
    """Whether a source is the folder of a finished run whose model is converted."""
    from tosa_convert.runs import folder as runs

    return runs.is_converted_run(source)


def stem(source: str) -> str:
    """A folder name for a source."""
    return Path(source.split(":")[-1]).name


def out_folder(out: Path | None, name: str, resume: bool = False, device: str | None = None) -> Path:
    """Where results go: as asked for, or a fresh folder under ./runs; the same in every process."""
    from tosa_convert.base import distributed as processes
    from tosa_convert.runs import folder as runs

    if out is None and resume:
        raise UsageError("--resume needs --out, the folder of the interrupted run")
    if resume and out is not None and not out.exists():
        say(f"there is nothing to resume in {out} yet, so it is begun")
    return processes.agree(out or runs.new_folder(name), device)
