"""The commands that show what a model does and what there is: flops, show, features, report, models."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tosa_convert.cli_options import (
    BypassOption,
    Checkpoint,
    Device,
    Hidden,
    ImgSize,
    Json,
    Kernel,
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
    stem,
)
from tosa_convert.cli_output import bar, print_json, show
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
    from tosa_convert import look_stages

    source, options = pick_source(source), convert_options(locals())
    _check_png(out, "--out")
    results = look_stages.show_stage(source, options, image or [], out, checkpoint=checkpoint, img_size=img_size)
    show(results, "show_table", as_json)


def features(
    source: Source = None,
    images: Annotated[
        str | None,
        typer.Option(help="folder of pictures, with or without folders in it", show_default="built-in photos"),
    ] = None,
    out: Annotated[Path, typer.Option(help="a .npz or .safetensors file")] = Path("features.npz"),
    dtype: Annotated[Dtype, typer.Option(help="of the numbers")] = Dtype.float32,
    batch_size: Annotated[int, typer.Option(help="pictures per forward pass", min=1)] = 8,
    workers: Workers = 0,
    checkpoint: Checkpoint = None,
    img_size: ImgSize = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Write patch and class features of a folder of pictures, converted model or not."""
    from tosa_convert import look_stages

    results = look_stages.features_stage(
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
    from tosa_convert import look_stages

    show(look_stages.report_stage(pick_source(source), out, progress=bar(as_json)), "report_table", as_json)


def flops(
    source: Source = None,
    layers: Layers = None,
    ratio: Ratio = None,
    method: MethodOption = None,
    score: ScoreOption = None,
    bypass: BypassOption = None,
    schedule: ScheduleOption = None,
    selection: SelectionOption = None,
    rows: Rows = None,
    hidden: Hidden = None,
    kernel: Kernel = None,
    img_size: ImgSize = None,
    plot: Annotated[
        Path | None, typer.Option(help="draw tokens and MACs per layer into this PNG", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Count multiply–adds per layer, original against converted. Needs no weights.

    With --layers or --ratio a model is converted first, to see what that would save.
    """
    from tosa_convert.loading import load
    from tosa_convert.macs import flops as count
    from tosa_convert.surgery import convert

    source = pick_source(source)
    if plot is not None:
        _check_png(plot, "--plot")
    model = load(source, img_size=img_size, pretrained=False)
    options = convert_options(locals())
    if options:
        convert(model, **options)
    cost = count(model).to_dict()
    if plot is not None:
        from tosa_convert.pictures import cost_picture

        cost["picture"] = str(cost_picture(cost, f"{stem(source)}: {cost['saved']:.1%} of the MACs saved", plot))
    show(cost, "flops_table", as_json, source)


def models(
    pattern: Annotated[str | None, typer.Argument(help="part of a timm name, or a pattern such as '*dinov2*'")] = None,
    as_json: Json = False,
) -> None:
    """Which models are supported, which are refused and why."""
    from tosa_convert import catalog
    from tosa_convert.report import Table

    if pattern:
        rows = catalog.models(pattern, bar(as_json))
        if not rows:
            raise UsageError(f"no timm model matches {pattern!r}; try a shorter part of its name")
        columns = ["model", "supported", "remark"]
        tables = {"Models": (columns, rows)}
    else:
        known = catalog.families()
        tables = {
            "Supported": (list(known[0]), [tuple(row.values()) for row in known]),
            "Refused": (["family", "why"], catalog.refused()),
        }
    if as_json:
        found = {
            name: [dict(zip(columns, row, strict=True)) for row in rows] for name, (columns, rows) in tables.items()
        }
        print_json(found["Models"] if pattern else {name.lower(): rows for name, rows in found.items()})
        return
    for name, (columns, rows) in tables.items():
        Table(name, columns, [list(row) for row in rows], []).print(Console(), left=True)


def _check_png(file: Path, option: str) -> None:
    if file.suffix != ".png":
        raise UsageError(f"{file.name} is no .png file; name one with {option}")
