"""The commands that show what a model does: show, features, report."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tosa_convert.cli_options import (
    BypassOption,
    Checkpoint,
    Device,
    ImgSize,
    Json,
    Layers,
    MethodOption,
    Ratio,
    Rows,
    ScheduleOption,
    ScoreOption,
    SelectionOption,
    Source,
    Workers,
    convert_options,
    pick_source,
)
from tosa_convert.cli_output import bar, show
from tosa_convert.errors import UsageError

Dtype = StrEnum("Dtype", ["float32", "float16"])


def show_patches(
    source: Source = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="a picture; may be given several times", show_default="built-in photos")
    ] = None,
    layers: Layers = None,
    ratio: Ratio = None,
    method: MethodOption = None,
    score: ScoreOption = None,
    bypass: BypassOption = None,
    schedule: ScheduleOption = None,
    selection: SelectionOption = None,
    rows: Rows = None,
    checkpoint: Checkpoint = None,
    img_size: ImgSize = None,
    out: Annotated[Path, typer.Option(help="the PNG")] = Path("show.png"),
    as_json: Json = False,
) -> None:
    """Draw which patches attend in each selective layer, and who stands in for the others.

    A model in place of a run is converted on the spot: --score similarity needs no training.
    """
    from tosa_convert import stages

    source, options = pick_source(source), convert_options(locals())
    if out.suffix != ".png":
        raise UsageError(f"{out.name} is no .png file; name one with --out")
    results = stages.show_stage(source, options, image or [], out, checkpoint=checkpoint, img_size=img_size)
    show(results, "show_table", as_json)


def features(
    source: Source = None,
    images: Annotated[
        str | None,
        typer.Option(help="folder of pictures, with or without folders in it", show_default="built-in photos"),
    ] = None,
    out: Annotated[Path, typer.Option(help="a .npz or .safetensors file")] = Path("features.npz"),
    dtype: Annotated[Dtype, typer.Option(help="of the numbers")] = Dtype.float32,
    batch_size: Annotated[int, typer.Option(help="pictures per forward pass")] = 8,
    workers: Workers = 0,
    checkpoint: Checkpoint = None,
    img_size: ImgSize = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Write patch and class features of a folder of pictures, converted model or not."""
    from tosa_convert import stages

    results = stages.features_stage(
        pick_source(source),
        images,
        out,
        batch_size=batch_size,
        dtype=dtype.value,
        workers=workers,
        checkpoint=checkpoint,
        img_size=img_size,
        device=device,
        progress=bar(as_json),
    )
    show(results, "features_table", as_json)


def report(
    source: Source = None,
    out: Annotated[Path | None, typer.Option(help="the HTML file", show_default="report.html in the run")] = None,
    as_json: Json = False,
) -> None:
    """Gather tables and pictures of a run in one HTML file that opens offline."""
    from tosa_convert import stages

    show(stages.report_stage(pick_source(source), out, progress=bar(as_json)), "report_table", as_json)
