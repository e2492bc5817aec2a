"""The bench command."""

from pathlib import Path
from typing import Annotated

import typer

from tosa_convert.cli.conversion import takes_conversion
from tosa_convert.cli.options import (
    IMAGES,
    Device,
    Json,
    Source,
    is_run,
    out_folder,
    pick_source,
    stem,
)
from tosa_convert.cli.output import bar, say, show
from tosa_convert.cli.parsing import at_least, image_size, names, numbers


@takes_conversion
def bench(
    source: Source = None,
    conversion: dict | None = None,
    against: Annotated[
        list[str] | None, typer.Option(help="another model or run to time; may be repeated", show_default=False)
    ] = None,
    runtime: Annotated[
        str, typer.Option(help="comma-separated: eager, compile, onnx, openvino")
    ] = "eager,compile,onnx",
    batch_size: Annotated[str, typer.Option(help="images per forward pass, comma-separated, such as 1,8")] = "1",
    img_size: Annotated[
        str | None,
        typer.Option(help="image sizes, comma-separated, such as 224,518 or 352x1120", show_default="the model's"),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="comma-separated: float32, int8 (of ONNX files), and bfloat16 on a GPU",
            show_default="float32, and bfloat16 on a GPU",
        ),
    ] = None,
    threads: Annotated[int, typer.Option(help="threads of torch and ONNX Runtime", callback=at_least(1))] = 1,
    rounds: Annotated[int, typer.Option(help="timed forward passes of each model", callback=at_least(1))] = 20,
    data: Annotated[
        str | None,
        typer.Option(help="time on images: " + IMAGES, show_default="noise; built-in photos where it has to be images"),
    ] = None,
    images: Annotated[int, typer.Option(help="number of images to time on", callback=at_least(1))] = 24,
    memory: Annotated[bool, typer.Option(help="measure peak memory, on a CPU each model in its own process")] = True,
    device: Device = None,
    out: Annotated[
        Path | None, typer.Option(help="folder for bench.json and bench.png", show_default="the run")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time the original and the converted model in turn, against the speed-up expected from MACs. Needs no weights.

    A model that is not a run is converted first, by --layers, --ratio and so on.
    """
    from tosa_convert.base.distributed import pick_device
    from tosa_convert.config.bench import BenchSettings
    from tosa_convert.config.validation import build
    from tosa_convert.workflows import pipeline as stages

    source = pick_source(source)
    kinds = "float32,bfloat16" if pick_device(device) == "cuda" else "float32"
    settings = build(
        BenchSettings,
        {
            "runtimes": names(runtime),
            "batch_sizes": numbers(batch_size, int, "--batch-size", least=1),
            "sizes": [image_size(each) for each in names(img_size)] if img_size else None,
            "precisions": names(precision or kinds),
            "threads": threads,
            "rounds": rounds,
            "memory": memory,
        },
    )
    if out is None and not is_run(source):
        out = out_folder(None, f"{stem(source)}-bench", False)
    results = stages.bench_stage(
        source,
        conversion,
        against or [],
        settings,
        data=data,
        images=images,
        out=out,
        device=device,
        progress=bar(as_json),
    )
    show(results, "bench_table", as_json)
    if results["cases"]:
        say(f"plot: {results['plot']}")
