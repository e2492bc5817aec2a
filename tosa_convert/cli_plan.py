"""The commands that choose for the user: plan, and compare, which shows what there is to choose from."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tosa_convert.cli_options import (
    Checkpoint,
    Device,
    ImgSize,
    Json,
    Labels,
    NumClasses,
    Out,
    numbers,
    out_folder,
    stem,
)
from tosa_convert.cli_output import bar, say, show
from tosa_convert.errors import UsageError

By = StrEnum("By", ["macs", "latency"])
Runtime = StrEnum("Runtime", ["eager", "onnx"])
SourceModel = Annotated[str, typer.Argument(help="timm name (or its beginning), hf:ORG/NAME, or a folder")]
Pictures = Annotated[
    str | None, typer.Option("--data", help="folder of pictures to look at", show_default="built-in photos")
]


def plan(
    model: SourceModel,
    budget: Annotated[float | None, typer.Option(help="share of the original's cost", show_default="0.75")] = None,
    target_drop: Annotated[
        float | None,
        typer.Option(
            help="instead: the cheapest plan that loses at most this (top-1, or 1 − cosine)", show_default=False
        ),
    ] = None,
    by: Annotated[By, typer.Option(help="what the budget is of; latency is measured here")] = By.macs,
    runtime: Annotated[Runtime, typer.Option(help="for the latency")] = Runtime.eager,
    data: Pictures = None,
    images: Annotated[int, typer.Option(help="pictures to look at")] = 24,
    labels: Labels = True,
    checkpoint: Checkpoint = None,
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    device: Device = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Find score, bypass and keep ratios for a budget, without training. Leaves a recipe for `tosa-convert run`."""
    from tosa_convert import plan_stages

    if images < 1:
        raise UsageError(f"--images {images}: look at one picture at least")
    results = plan_stages.plan_stage(
        model,
        data=data,
        images=images,
        labels=labels,
        budget=budget,
        target_drop=target_drop,
        by=by.value,
        runtime=runtime.value,
        checkpoint=checkpoint and str(checkpoint),
        img_size=img_size,
        num_classes=num_classes,
        out=out_folder(out, f"{stem(model)}-plan"),
        device=device,
        progress=bar(as_json),
    )
    show(results, "plan_table", as_json)


def compare(
    model: SourceModel,
    budgets: Annotated[str, typer.Option(help="shares of the original's MACs, in a list")] = "0.9,0.8,0.7,0.6",
    methods: Annotated[
        str,
        typer.Option(help="plan, tosa, tome, idle, evit, SCORE/BYPASS[/SCHEDULE], in a list; random is always there"),
    ] = "plan,similarity/merge,tome,evit,idle,tosa",
    data: Pictures = None,
    images: Annotated[int, typer.Option(help="pictures to look at")] = 32,
    labels: Labels = True,
    distill_steps: Annotated[int, typer.Option(help="train tosa's selectors for so many steps first")] = 0,
    latency: Annotated[bool, typer.Option(help="measure the latency too")] = True,
    runtime: Annotated[Runtime, typer.Option(help="for the latency")] = Runtime.eager,
    checkpoint: Checkpoint = None,
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    device: Device = None,
    out: Annotated[Path | None, typer.Option(help="folder for the results", show_default="runs/…")] = None,
    as_json: Json = False,
) -> None:
    """Put methods side by side at the same budgets, without training, on the same pictures."""
    from tosa_convert import plan_stages

    if images < 1:
        raise UsageError(f"--images {images}: look at one picture at least")
    folder = out_folder(out, f"{stem(model)}-compare")
    results = plan_stages.compare_stage(
        model,
        out=folder,
        checkpoint=checkpoint and str(checkpoint),
        img_size=img_size,
        num_classes=num_classes,
        data=data,
        budgets=numbers(budgets, float, "--budgets"),
        methods=[name.strip() for name in methods.split(",")],
        images=images,
        labels=labels,
        distill_steps=distill_steps,
        runtime=runtime.value if latency else None,
        device=device,
        progress=bar(as_json),
    )
    show(results, "compare_table", as_json)
    say(f"wrote {folder / 'compare.json'}, compare.md and compare.png")
