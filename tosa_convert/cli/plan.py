"""The commands that choose for the user: plan, and compare, which shows what there is to choose from."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tosa_convert.base import discovery
from tosa_convert.cli.dense import source_with, takes_head, takes_maps
from tosa_convert.cli.options import (
    IMAGES,
    Checkpoint,
    Device,
    ImgSize,
    Json,
    Labels,
    NumClasses,
    Out,
    out_folder,
    stem,
)
from tosa_convert.cli.output import bar, say, show
from tosa_convert.cli.parsing import at_least, names, numbers, whole_number

By = StrEnum("By", ["macs", "latency"])
Keep = StrEnum("Keep", ["patches", "pooled", "logits", "map"])
Runtime = StrEnum("Runtime", ["eager", "compile", "onnx", "openvino"])
Precision = StrEnum("Precision", ["float32", "int8"])
SourceModel = Annotated[str, typer.Argument(help="timm name (or its beginning), hf:ORG/NAME, or a folder")]
Sample = Annotated[
    str | None,
    typer.Option("--data", help=IMAGES, show_default="built-in photos"),
]
KeepOption = Annotated[
    Keep | None,
    typer.Option(
        "--keep",
        help="what has to stay as it is: patches with the class token, pooled features or an embedding, …",
        show_default="logits of a classifier, the map of a dense head, otherwise patches",
    ),
]
SampleSize = Annotated[int, typer.Option(help="number of images to measure on", callback=at_least(1))]


@takes_head
@takes_maps
def plan(
    model: SourceModel,
    budget: Annotated[float | None, typer.Option(help="share of the original's cost", show_default="0.75")] = None,
    target_drop: Annotated[
        float | None,
        typer.Option(
            help="in place of a budget: largest drop allowed (top-1, agreement or cosine)",
            show_default=False,
        ),
    ] = None,
    keep: KeepOption = None,
    by: Annotated[By, typer.Option(help="cost that the budget limits; latency is measured on this machine")] = By.macs,
    target_ms: Annotated[
        float | None,
        typer.Option(help="in place of a budget: milliseconds per forward pass, measured here", show_default=False),
    ] = None,
    runtime: Annotated[Runtime, typer.Option(help="runtime of the latency measurement")] = Runtime.eager,
    precision: Annotated[
        Precision, typer.Option(help="number format of the latency measurement and of the recipe's export")
    ] = Precision.float32,
    threads: Annotated[int, typer.Option(help="threads of the latency measurement", callback=at_least(1))] = 1,
    batch_size: Annotated[
        int, typer.Option(help="images per forward pass of the latency measurement", callback=at_least(1))
    ] = 1,
    segment: Annotated[
        str | None,
        typer.Option(
            help="layers in a row that share one choice, which saves time beside the MACs",
            show_default="1, or searched for --by latency",
        ),
    ] = None,
    adaptive: Annotated[
        bool, typer.Option("--adaptive", help="each image keeps as many tokens as it needs; the budget is their mean")
    ] = False,
    max_macs: Annotated[
        float | None,
        typer.Option(help="with --adaptive: share of the original's MACs that no image exceeds", show_default=False),
    ] = None,
    data: Sample = None,
    map_options: dict | None = None,
    new_head: dict | None = None,
    images: SampleSize = 24,
    labels: Labels = True,
    checkpoint: Checkpoint = None,
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    device: Device = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Find score, bypass and keep ratios for a budget, without training. Writes a recipe for `tosa-convert run`."""
    from tosa_convert.workflows import plans as plan_stages

    results = plan_stages.plan_stage(
        model,
        data=source_with(data, map_options),
        head=new_head,
        images=images,
        labels=labels,
        budget=budget,
        target_drop=target_drop,
        keep=keep and keep.value,
        by=by.value,
        runtime=runtime.value,
        precision=precision.value,
        threads=threads,
        batch_size=batch_size,
        target_ms=target_ms,
        segment=None if segment is None else whole_number(segment, "--segment", 1),
        adaptive=adaptive,
        max_macs=max_macs,
        checkpoint=checkpoint and str(checkpoint),
        img_size=img_size,
        num_classes=num_classes,
        out=out_folder(out, f"{stem(model)}-plan"),
        device=device,
        progress=bar(as_json),
    )
    show(results, "plan_table", as_json)


@takes_head
@takes_maps
def compare(
    model: SourceModel,
    budgets: Annotated[str, typer.Option(help="shares of the original's MACs, comma-separated")] = "0.9,0.8,0.7,0.6",
    methods: Annotated[
        str,
        typer.Option(
            help=f"plan, adaptive, {', '.join(discovery.names('methods/published'))}, SCORE/BYPASS or "
            "SCORE/BYPASS/SCHEDULE, comma-separated; random is added"
        ),
    ] = "plan,similarity/merge,tome,mctf,pitome,mpm,frequency,evit,idle,tosa",
    data: Sample = None,
    map_options: dict | None = None,
    new_head: dict | None = None,
    images: SampleSize = 32,
    labels: Labels = True,
    keep: KeepOption = None,
    distill_steps: Annotated[int, typer.Option(help="steps to train tosa's selectors", callback=at_least(0))] = 0,
    latency: Annotated[bool, typer.Option(help="also measure latency")] = True,
    runtime: Annotated[Runtime, typer.Option(help="runtime of the latency measurement")] = Runtime.eager,
    checkpoint: Checkpoint = None,
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    device: Device = None,
    out: Annotated[Path | None, typer.Option(help="folder for the results", show_default="runs/…")] = None,
    as_json: Json = False,
) -> None:
    """Compare methods at the same budgets, without training, on the same images."""
    from tosa_convert.workflows import plans as plan_stages

    folder = out_folder(out, f"{stem(model)}-compare")
    results = plan_stages.compare_stage(
        model,
        out=folder,
        checkpoint=checkpoint and str(checkpoint),
        img_size=img_size,
        num_classes=num_classes,
        head=new_head,
        data=source_with(data, map_options),
        budgets=numbers(budgets, float, "--budgets"),
        methods=names(methods),
        images=images,
        labels=labels,
        keep=keep and keep.value,
        distill_steps=distill_steps,
        runtime=runtime.value if latency else None,
        device=device,
        progress=bar(as_json),
    )
    show(results, "compare_table", as_json)
    say(f"wrote {folder / 'compare.json'}, compare.md and compare.png")
