"""The export command."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tosa_convert.cli.dense import source_with, takes_head, takes_maps
from tosa_convert.cli.options import (
    Checkpoint,
    DataOption,
    ImgSize,
    Json,
    Labels,
    NumClasses,
    Source,
    is_run,
    out_folder,
    pick_source,
    stem,
)
from tosa_convert.cli.output import bar, failures_shown, show
from tosa_convert.cli.parsing import at_least, plain

Precision = StrEnum("Precision", ["float32", "float16", "int8", "auto"])
Also = StrEnum("Also", ["openvino"])
Calibration = StrEnum("Calibration", ["minmax", "percentile", "entropy"])


@takes_head
@takes_maps
def export(
    source: Source = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="write ONNX (the only format so far)")] = True,
    data: DataOption = None,
    map_options: dict | None = None,
    new_head: dict | None = None,
    checkpoint: Checkpoint = None,
    num_classes: NumClasses = None,
    out: Annotated[Path | None, typer.Option(help="folder for the files", show_default="the run")] = None,
    img_size: ImgSize = None,
    opset: Annotated[int, typer.Option(help="ONNX operator set")] = 20,
    threshold: Annotated[float, typer.Option(help="lowest agreement with torch at which the export passes")] = 0.99,
    images: Annotated[int, typer.Option(help="most images in the check", callback=at_least(1))] = 512,
    any_size: Annotated[bool, typer.Option("--any-size", help="accept images of any size, if the model does")] = False,
    raw_input: Annotated[
        bool,
        typer.Option("--raw-input", help="take pixels (uint8, HWC), resized to the model's size; give probabilities"),
    ] = False,
    precision: Annotated[
        Precision, typer.Option(help="number format; auto tries all, and keeps the fastest here that is near enough")
    ] = Precision.float32,
    calibration: Annotated[
        Calibration | None,
        typer.Option(help="find the ranges of int8 beforehand, on --data", show_default="found in each image"),
    ] = None,
    calibration_images: Annotated[int, typer.Option(help="number of images for that", callback=at_least(8))] = 32,
    min_agreement: Annotated[
        float, typer.Option(help="in fewer bits: least share of images with the same top-1, of classifiers")
    ] = 0.97,
    min_cosine: Annotated[
        float, typer.Option(help="in fewer bits: least mean cosine, of models that give tokens or an embedding")
    ] = 0.99,
    max_error: Annotated[float, typer.Option(help="in fewer bits: largest error of maps, as a plan has it")] = 0.02,
    threads: Annotated[
        int, typer.Option(help="in fewer bits: threads of the speed measurement", callback=at_least(1))
    ] = 1,
    also: Annotated[
        Also | None, typer.Option(help="another runtime to check and time the file in", show_default=False)
    ] = None,
    labels: Labels = True,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; the export and its check run on the CPU either way")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write ONNX, and check it in ONNX Runtime against torch on real images.

    In fewer bits, operators that hurt are left in float until the file is near enough to the model in float32.
    """
    from tosa_convert.base.distributed import pick_device
    from tosa_convert.config.settings import ExportSettings
    from tosa_convert.config.validation import build
    from tosa_convert.workflows import pipeline as stages

    pick_device(device)
    source = pick_source(source)
    new_head |= plain({"checkpoint": checkpoint, "num_classes": num_classes})
    settings = build(
        ExportSettings,
        {
            "opset": opset,
            "threshold": threshold,
            "images": images,
            "labels": labels,
            "any_size": any_size,
            "raw_input": raw_input,
            "precision": precision.value,
            "calibration": calibration and calibration.value,
            "calibration_images": calibration_images,
            "min_agreement": min_agreement,
            "min_cosine": min_cosine,
            "max_error": max_error,
            "threads": threads,
            "also": also and also.value,
        },
    )
    if out is None and not is_run(source):
        out = out_folder(None, f"{stem(source)}-onnx", False)
    found = source_with(data, map_options)
    how = {"out": out, "img_size": img_size, "head": new_head}
    with failures_shown(as_json):
        results = stages.export_stage(source, settings, found, **how, progress=bar(as_json))
    show(results, "export_table", as_json)
