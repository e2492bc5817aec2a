"""The options that commands share, and how they turn into a recipe."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tosa_convert.cli_output import say
from tosa_convert.errors import UsageError


class Selection(StrEnum):
    shared = "shared"
    per_head = "per_head"


Method = StrEnum("Method", ["tosa", "tome", "idle", "evit", "random"])
Score = StrEnum("Score", ["attention", "class_attention", "similarity", "norm", "random"])
Bypass = StrEnum("Bypass", ["identity", "borrow", "merge", "drop", "fuse", "persist"])
Schedule = StrEnum("Schedule", ["pairs", "all", "ramp", "stages"])


class Augment(StrEnum):
    crop = "crop"
    flip = "flip"
    none = "none"


class Precision(StrEnum):
    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


MODEL_HELP = "timm name (or its beginning), hf:ORG/NAME, a transformers or timm folder, or a run"
Model = Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default=False)]
Source = Annotated[str | None, typer.Argument(help=f"{MODEL_HELP}; left out: the newest run", show_default=False)]
Layers = Annotated[
    str | None,
    typer.Option(help="selective layers from 1, such as 2,4,6 or 3:0.9,5:0.7", show_default="the schedule's"),
]
Ratio = Annotated[
    str | None, typer.Option(help="share of patches that attend, one or one per layer", show_default="0.8")
]
SelectionOption = Annotated[
    Selection | None, typer.Option(help="one token set per layer, or per head", show_default="shared")
]
MethodOption = Annotated[
    Method | None, typer.Option(help="published score, bypass and schedule in one", show_default="tosa")
]
ScoreOption = Annotated[
    Score | None, typer.Option(help="who chooses the tokens; random is the control", show_default="attention")
]
BypassOption = Annotated[Bypass | None, typer.Option(help="what the other tokens get", show_default="identity")]
ScheduleOption = Annotated[
    Schedule | None, typer.Option(help="which layers, and how the ratio runs over them", show_default="pairs")
]
Rows = Annotated[
    str | None, typer.Option(help="query rows that score the tokens, or all (the paper)", show_default="32")
]
Hidden = Annotated[int | None, typer.Option(help="channels of the selector", show_default="2 per head")]
Kernel = Annotated[int | None, typer.Option(help="width of the selector's convolutions", show_default="3")]
DataOption = Annotated[
    str | None,
    typer.Option(help="folder of images, one sub-folder per class if labelled", show_default="built-in photos"),
]
RecipeOption = Annotated[str | None, typer.Option(help="recipe that the other options override", show_default=False)]
Out = Annotated[Path | None, typer.Option(help="folder for the results", show_default="runs/…")]
Checkpoint = Annotated[
    Path | None, typer.Option(help="weights for a timm name: .safetensors or .pth", show_default=False)
]
ImgSize = Annotated[int | None, typer.Option(help="image side in pixels", show_default="the model's")]
NumClasses = Annotated[int | None, typer.Option(help="outputs of the head", show_default="the model's")]
Steps = Annotated[int | None, typer.Option(help="optimiser steps", show_default="100")]
Labels = Annotated[bool, typer.Option(help="the folders of the pictures are classes, if there are several")]
Epochs = Annotated[float | None, typer.Option(help="passes over the data, in place of steps", show_default=False)]
BatchSize = Annotated[int | None, typer.Option(help="pictures per forward pass", show_default="8")]
Lr = Annotated[float | None, typer.Option(help="peak learning rate", show_default="the stage's")]
AugmentOption = Annotated[Augment | None, typer.Option(help="of the training pictures", show_default="crop")]
PrecisionOption = Annotated[Precision | None, typer.Option(help="mixed precision", show_default="no")]
Workers = Annotated[int | None, typer.Option(help="processes that read pictures", show_default="0")]
Seed = Annotated[int | None, typer.Option(help="of everything random", show_default="0")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda", show_default="a GPU if there is one")]
Resume = Annotated[bool, typer.Option("--resume", help="go on with the interrupted run in --out")]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON")]


def make_recipe(path: str | None, stage: str, options: dict):
    """The recipe to work by: a file's, with the options of the command over it."""
    from tosa_convert.config import ConvertConfig, build_config
    from tosa_convert.recipe import Recipe, find_recipe, read_recipe
    from tosa_convert.settings import DistillSettings, FinetuneSettings

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
    plan[stage] = build_config(kind, {**before, **typed})
    plan["convert"] = build_config(ConvertConfig, {**plan.get("convert", {}), **convert_options(options)})
    if options.get("data") is not None:
        plan["data"] = {**plan.get("data", {}), "train": options["data"]}
    return build_config(Recipe, {**plan, **_given(options, ("model", "checkpoint", "img_size", "num_classes", "seed"))})


def _given(options: dict, names) -> dict:
    """Options that were typed, as plain values."""
    found = {name: options[name] for name in names if options.get(name) is not None}
    return {name: str(value) if isinstance(value, (Path, StrEnum)) else value for name, value in found.items()}


def convert_options(options: dict) -> dict:
    found = _given(options, ("method", "score", "bypass", "schedule", "selection", "hidden", "kernel"))
    if options.get("layers") is not None:
        found["layers"] = _layers(options["layers"])
    if options.get("rows") is not None:
        found["rows"] = _query_rows(options["rows"])
    if options.get("ratio") is not None:
        ratios = numbers(options["ratio"], float, "--ratio")
        found["ratio"] = ratios[0] if len(ratios) == 1 else ratios
    return found


def _layers(text: str) -> list[int] | dict[int, float]:
    """2,4,6 or 3:0.9,5:0.7."""
    if ":" not in text:
        return numbers(text, int, "--layers")
    pairs = [part.split(":") for part in text.split(",")]
    try:
        found = {int(layer): float(ratio) for layer, ratio in pairs}
    except ValueError:
        raise UsageError(f"--layers {text!r} is no list of layer:ratio; write it like 3:0.9,5:0.7") from None
    if len(found) < len(pairs):
        raise UsageError(f"--layers {text!r} names a layer twice; name each layer once")
    return found


def _query_rows(text: str) -> int | str:
    if text != "all" and not text.isdecimal():
        raise UsageError(f"--rows {text!r} is no number of query rows; give one number, such as 32, or all")
    return text if text == "all" else int(text)


def numbers(text: str, kind: type, option: str) -> list:
    """An option's comma-separated numbers."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        example = "2,4,6" if kind is int else "0.8 or 0.9,0.8,0.7"
        raise UsageError(f"{option} {text!r} is not a list of numbers; write it like {example}") from None


def pick_source(source: str | None) -> str:
    """The source that was named, or the newest run."""
    from tosa_convert import runs

    if source is not None:
        return source
    found = str(runs.newest())
    say(f"using the newest run, {found}")
    return found


def is_run(source: str) -> bool:
    """Whether a source is the folder of a finished run."""
    from tosa_convert import runs

    return runs.is_run(source)


def stem(source: str) -> str:
    """A folder name for a source."""
    return Path(source.split(":")[-1]).name


def out_folder(out: Path | None, name: str, resume: bool = False, device: str | None = None) -> Path:
    """Where results go: as asked for, or a fresh folder under ./runs; the same in every process."""
    from tosa_convert import processes, runs

    if out is None and resume:
        raise UsageError("--resume needs --out, the folder of the interrupted run")
    return processes.agree(out or runs.new_folder(name), device)
