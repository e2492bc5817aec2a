"""The bench command."""

from pathlib import Path
from typing import Annotated

import typer

from tosa_convert.cli_options import (
    BypassOption,
    Device,
    Hidden,
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
    convert_options,
    is_run,
    numbers,
    out_folder,
    pick_source,
    stem,
)
from tosa_convert.cli_output import bar, say, show


def bench(
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
    against: Annotated[
        list[str] | None, typer.Option(help="any other model or run, timed too; may be repeated", show_default=False)
    ] = None,
    runtime: Annotated[str, typer.Option(help="eager, compile, onnx, in a list")] = "eager,compile,onnx",
    batch_size: Annotated[str, typer.Option(help="pictures per forward pass, in a list such as 1,8")] = "1",
    img_size: Annotated[
        str | None, typer.Option(help="image sides in pixels, in a list such as 224,518", show_default="the model's")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, and on a GPU bf16, in a list", show_default="all that fit")
    ] = None,
    threads: Annotated[int, typer.Option(help="of torch and ONNX Runtime")] = 1,
    rounds: Annotated[int, typer.Option(help="timed forward passes of each model")] = 20,
    memory: Annotated[bool, typer.Option(help="measure peak memory, each in a process of its own")] = True,
    device: Device = None,
    out: Annotated[
        Path | None, typer.Option(help="folder for bench.json and bench.png", show_default="the run")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time the original and the converted model in turn, beside what the multiply–adds promise. Needs no weights.

    A model that is not a run is converted first, with --layers, --ratio and so on.
    """
    from tosa_convert import stages
    from tosa_convert.benching import BenchSettings
    from tosa_convert.config import build_config
    from tosa_convert.processes import pick_device

    source = pick_source(source)
    options = convert_options(locals())
    kinds = "fp32,bf16" if pick_device(device) == "cuda" else "fp32"
    settings = build_config(
        BenchSettings,
        {
            "runtimes": [name.strip() for name in runtime.split(",")],
            "batch_sizes": numbers(batch_size, int, "--batch-size"),
            "sizes": numbers(img_size, int, "--img-size") if img_size else None,
            "precisions": [name.strip() for name in (precision or kinds).split(",")],
            "threads": threads,
            "rounds": rounds,
            "memory": memory,
        },
    )
    if out is None and not is_run(source):
        out = out_folder(None, f"{stem(source)}-bench", False)
    results = stages.bench_stage(
        source, options, against or [], settings, out=out, device=device, progress=bar(as_json)
    )
    show(results, "bench_table", as_json)
    if results["cases"]:
        say(f"picture: {results['picture']}")
