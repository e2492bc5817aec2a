"""The commands that show what a model does and what there is: flops, show, features, report, models."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tosa_convert.base.errors import UsageError
from tosa_convert.cli.conversion import takes_conversion
from tosa_convert.cli.options import (
    IMAGES,
    Checkpoint,
    Device,
    ImgSize,
    Json,
    Source,
    Workers,
    pick_source,
)
from tosa_convert.cli.output import bar, print_json, show
from tosa_convert.cli.parsing import at_least, check_png

Dtype = StrEnum("Dtype", ["float32", "float16"])


@takes_conversion
def show_patches(
    source: Source = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="an image file; may be repeated", show_default="built-in photos")
    ] = None,
    conversion: dict | None = None,
    checkpoint: Checkpoint = None,
    img_size: ImgSize = None,
    device: Device = None,
    out: Annotated[Path, typer.Option(help="PNG file to write")] = Path("show.png"),
    as_json: Json = False,
) -> None:
    """Draw which patches attend in each selective layer, and which of them represent the others.

    A model that is not a run is converted first, by --layers, --ratio and so on; --score similarity needs no training.
    Maps of dense models are drawn beside, also of one that is not converted.
    """
    from tosa_convert.workflows import inspection as stages

    check_png(out, "--out")
    results = stages.show_stage(
        pick_source(source),
        conversion,
        image or [],
        out,
        checkpoint=checkpoint,
        img_size=img_size,
        device=device,
        progress=bar(as_json),
    )
    show(results, "show_table", as_json)


def features(
    source: Source = None,
    images: Annotated[
        str | None,
        typer.Option(help=IMAGES, show_default="built-in photos"),
    ] = None,
    out: Annotated[Path, typer.Option(help=".npz or .safetensors file to write")] = Path("features.npz"),
    dtype: Annotated[Dtype, typer.Option(help="number format in the file")] = Dtype.float32,
    batch_size: Annotated[int, typer.Option(help="images per forward pass", callback=at_least(1))] = 8,
    workers: Workers = 0,
    checkpoint: Checkpoint = None,
    img_size: ImgSize = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Write patch and class-token features of a folder of images. The model may be converted or not."""
    from tosa_convert.workflows import inspection as stages

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
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Write the summary, tables and plots of a run to one HTML file that opens offline."""
    from tosa_convert.workflows import inspection as stages

    results = stages.report_stage(pick_source(source), out, device=device, progress=bar(as_json))
    show(results, "report_table", as_json)


@takes_conversion
def flops(
    source: Source = None,
    conversion: dict | None = None,
    img_size: ImgSize = None,
    data: Annotated[
        str | None,
        typer.Option(help="count over images: " + IMAGES, show_default="built-in photos, where it has to be images"),
    ] = None,
    images: Annotated[int, typer.Option(help="number of images to count over", callback=at_least(1))] = 24,
    plot: Annotated[
        Path | None, typer.Option(help="PNG file for a plot of tokens and MACs per layer", show_default=False)
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Count multiply–adds (MACs) per layer, original against converted. Needs no weights.

    Where each image keeps as many tokens as it needs: their mean over images, the least and the most.

    A model that is not a run is converted first if --layers, --ratio and so on are given.
    """
    from tosa_convert.workflows import inspection as stages

    source = pick_source(source)
    if plot is not None:
        check_png(plot, "--plot")
    cost = stages.flops_stage(
        source, conversion, plot, data=data, images=images, img_size=img_size, device=device, progress=bar(as_json)
    )
    show(cost, "flops_table", as_json, source)


def doctor(as_json: Json = False) -> None:
    """Show what this machine can do: threads, instructions, runtimes, exporters, weights. Add it to bug reports."""
    from tosa_convert.workflows.doctor import examine_machine

    show(examine_machine(bar(as_json)), "doctor_table", as_json)


def models(
    pattern: Annotated[
        str | None,
        typer.Argument(
            help="part of a timm name or a pattern such as '*dinov2*'; or a folder, hf:ORG/NAME or a class of "
            "transformers, which is proven if it has to be"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List which models are supported, and which are refused and why; or prove that one is."""
    from tosa_convert.models import supported as catalog
    from tosa_convert.reporting.table import Table

    if pattern and (Path(pattern).is_dir() or pattern.startswith("hf:") or catalog.is_class(pattern)):
        from tosa_convert.workflows.inspection import examine_stage

        show(examine_stage(pattern), "examine_table", as_json)
        return
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
        Table(name, columns, [list(row) for row in rows], [], left=True).print(Console())
