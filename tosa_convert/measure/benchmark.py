"""The measured speed-up of a conversion, against the one expected from its MACs."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, Strict
from torch import nn

from tosa_convert.base.distributed import pick_device
from tosa_convert.base.environment import machine
from tosa_convert.base.errors import TosaError, UsageError, gist, is_out_of_memory
from tosa_convert.base.progress import Progress
from tosa_convert.base.timing import Timing, check_threads, interleave, pinned, quartiles
from tosa_convert.data.sampling import sample
from tosa_convert.export import runtimes
from tosa_convert.export.graph_files import GraphFiles
from tosa_convert.measure import peak_memory as memory
from tosa_convert.measure.macs import Cost, flops
from tosa_convert.models.adapter import adapter_of
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.runs import folder as runs
from tosa_convert.runs.loading import set_image_size
from tosa_convert.selective.selection import keeps_any_number


class BenchSettings(BaseModel):
    """What is timed.

    Attributes:
        runtimes: of "eager", "compile" (torch.compile), "onnx" (ONNX Runtime) and "openvino".
        batch_sizes: images per forward pass.
        sizes: image sides in pixels, or (height, width); None is the model's own size.
        precisions: "float32", "int8" (in ONNX Runtime, ranges found in each image), and on a GPU "bfloat16" (in torch).
        threads: of torch and of ONNX Runtime; the process is pinned to as many processors.
        rounds: timed forward passes of each model.
        memory: also measure peak memory, on the CPU each model in a process of its own.
        opset: of the ONNX files.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    runtimes: list[str] = ["eager", "compile", "onnx"]
    batch_sizes: list[int] = [1]
    sizes: list[int | Annotated[tuple[int, int], Strict(False)]] | None = None
    precisions: list[str] = ["float32"]
    threads: int = Field(default=1, ge=1)
    rounds: int = Field(default=20, ge=1)
    memory: bool = True
    opset: int = Field(default=20, ge=18)


PASSES = 3
"""Over real images, at least."""


@dataclass(frozen=True)
class _Case:
    """The conditions that all models are timed under together."""

    runtime: str
    batch_size: int
    precision: str
    device: str


def bench(
    models: dict[str, nn.Module],
    settings: BenchSettings | None = None,
    *,
    files: dict[str, dict[str, Path]] | None = None,
    data: str | Path | None = None,
    images: int = 24,
    device: str | None = None,
    progress: Progress | None = None,
) -> dict:
    """Time models against the first of them, in turn, in one process.

    Args:
        models: name → model; the first is the reference, usually the original. They are moved to the
            device, set to the image sizes and precisions, and left there.
        settings: what is timed.
        files: name → precision → ONNX file of the model at its own image size, timed in place of a fresh export.
        data: a folder of images to run on, in turn; None is random noise, and the built-in photos if one of the models
            keeps as many tokens as an image needs.
        images: how many of them.
        device: "cpu" or "cuda"; None takes a GPU if there is one.

    Returns:
        {"machine", "device", "reference", "settings", "notes", "cases"}. A case holds "runtime", "batch_size", "size",
        "precision" and per model "ms" (median), "ms_quartiles", "memory" (bytes or None) and, against the
        reference, "speedup" (median over rounds), "speedup_quartiles", "ideal" and "reached".
        "ideal" is the ratio of MACs excluding selector cost; "reached" is
        the share speedup / ideal.
    """
    settings, device = settings or BenchSettings(), pick_device(device)
    _check(models, settings, device)
    lacking = {name: why for name in settings.runtimes if (why := runtimes.missing(name, device))}
    notes = [f"{name} is left out: {why}" for name, why in lacking.items()]
    possible = [name for name in settings.runtimes if name not in lacking]
    if not possible:
        raise UsageError(f"nothing can be timed: {'; '.join(f'{name}: {why}' for name, why in lacking.items())}")
    kinds = [
        _Case(runtime, batch, precision, device)
        for runtime, batch, precision in product(possible, settings.batch_sizes, settings.precisions)
        if precision in runtimes.PRECISIONS[runtime]
    ]
    sizes = _sizes(models, settings)
    if settings.sizes is None:
        others = {name: preprocessing_of(model).size for name, model in models.items()}
        notes += [f"{name}: not timed at its own image size" for name, own in others.items() if own != sizes[0]]
    anything = data is None and not any(map(keeps_any_number, models.values()))
    if data is None and not anything:
        notes.append("on built-in photos, since the number of tokens differs from image to image; --data gives others")
    cases = []
    per_case = settings.rounds + 2 + (len(models) if settings.memory else 0)
    with (progress or Progress()).track("bench", total=len(sizes) * len(kinds) * per_case) as advance:
        for size in sizes:
            for model in models.values():
                if preprocessing_of(model).size != size:
                    set_image_size(model, size)
                model.to(device)  # where counting is quicker too
            pixels = dict.fromkeys(models) if anything else _pixels(models, data, images)
            costs = {name: _cost(model, pixels[name]) for name, model in models.items()}
            macs = {name: cost.macs - cost.selectors for name, cost in costs.items()}
            notes += [_spread(name, cost, data) for name, cost in costs.items() if cost.images]
            with tempfile.TemporaryDirectory() as scratch:
                given = (files or {}) if settings.sizes is None else {}
                graphs = {
                    name: GraphFiles(model, Path(scratch) / str(index), settings.opset, given.get(name))
                    for index, (name, model) in enumerate(models.items())
                }
                for case in kinds:
                    try:
                        _check_alone(models, case)
                        timings, peaks = _run(case, models, size, pixels, settings, graphs, advance, notes)
                    except _NoBatchError as error:
                        notes.append(str(error))
                        continue
                    except _CompilerError as error:
                        notes.append(f"torch.compile does not work here: {error}")
                        continue
                    except Exception as error:
                        if not is_out_of_memory(error):
                            raise
                        left_out = f"{case.runtime}, {case.precision}, batch {case.batch_size}, {size[0]}×{size[1]} px"
                        notes.append(f"{left_out} is left out: it does not fit into memory")
                        continue
                    cases.append(
                        {
                            "runtime": case.runtime,
                            "batch_size": case.batch_size,
                            "size": list(size),
                            "precision": case.precision,
                            "models": _figures(timings, peaks, macs),
                        }
                    )
    if not cases:
        raise TosaError(f"nothing could be timed: {'; '.join(dict.fromkeys(notes))}")
    return {
        "machine": machine(device),
        "device": device,
        "reference": next(iter(models)),
        "settings": settings.model_dump(),
        "notes": list(dict.fromkeys(notes)),
        "cases": cases,
    }


class _NoBatchError(Exception):
    """An ONNX file that takes one image at a time is to be timed on more."""


def _check_alone(models: dict[str, nn.Module], case: _Case) -> None:
    if case.runtime in runtimes.ON_FILES and case.batch_size > 1 and any(map(keeps_any_number, models.values())):
        raise _NoBatchError(
            f"{case.runtime} at batch {case.batch_size} is left out: the file takes one image at a time, since each "
            "keeps as many tokens as it needs"
        )


def _pixels(models: dict[str, nn.Module], data: str | Path | None, images: int) -> dict[str, torch.Tensor | None]:
    """The images for each model, opened once for all that take them alike."""
    ways = {name: preprocessing_of(model) for name, model in models.items()}
    each = {str(way): way for way in ways.values()}
    opened = {key: sample(data, way, images, crops=False)[0] for key, way in each.items()}
    return {name: opened[str(way)] for name, way in ways.items()}


class _CompilerError(Exception):
    """torch.compile has no compiler, or fails on the model."""


def _check(models: dict[str, nn.Module], settings: BenchSettings, device: str) -> None:
    if not models:
        raise UsageError("there is no model to time")
    for name, given, known in (
        ("runtime", settings.runtimes, tuple(runtimes.PRECISIONS)),
        ("precision", settings.precisions, runtimes.EVERY_PRECISION),
    ):
        for value in given:
            if value not in known:
                raise UsageError(f"{name} {value!r} is not known; choose from {', '.join(known)}")
    for precision in settings.precisions:
        able = [name for name, known in runtimes.PRECISIONS.items() if precision in known]
        if not set(able) & set(settings.runtimes):
            raise UsageError(
                f"{precision} is timed in {' and '.join(able)}; add one of them to --runtime, or leave it out"
            )
    if "bfloat16" in settings.precisions and device == "cpu":
        raise UsageError("bfloat16 is timed on a GPU; leave it out on the CPU")
    sides = [side for size in settings.sizes or [] for side in _pair(size)]
    if any(value < 1 for value in [*settings.batch_sizes, *sides]):
        raise UsageError("batch sizes and image sizes have to be 1 or more")
    check_threads(settings.threads)
    for name, (height, width) in product(models, _sizes(models, settings)):
        adapter = adapter_of(models[name])
        if not adapter.fits((height, width)):
            wrong, unit = f"{height}×{width} px", f"{adapter.patch[0]}×{adapter.patch[1]}"
            raise UsageError(
                f"{wrong} is not a multiple of the patch size of {name}, {unit}; choose another --img-size"
            )


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _sizes(models: dict[str, nn.Module], settings: BenchSettings) -> list[tuple[int, int]]:
    if settings.sizes:
        return [_pair(size) for size in settings.sizes]
    return [preprocessing_of(next(iter(models.values()))).size]


def _cost(model: nn.Module, images: torch.Tensor | None) -> Cost:
    return flops(model, images=images if keeps_any_number(model) else None)


def _spread(name: str, cost: Cost, data: str | Path | None) -> str:
    """What images take where they differ in that."""
    mean, least, most = (100 * each / cost.original for each in (cost.macs, cost.least, cost.most))
    of = "crops of built-in photos" if data is None else f"images of {Path(data).name}"
    return f"{name}: {mean:.1f} % of the MACs on average over {cost.images} {of}, {least:.1f} to {most:.1f} %"


def _run(
    case: _Case,
    models: dict,
    size: tuple[int, int],
    pixels: dict[str, torch.Tensor | None],
    settings: BenchSettings,
    files: dict[str, GraphFiles],
    advance: Callable,
    notes: list[str],
) -> tuple[dict[str, Timing], dict[str, int | None]]:
    """The timings and peaks of one case. A peak that cannot be measured leaves a note; the timings stay."""
    shapes = {name: (case.batch_size, preprocessing_of(model).channels, *size) for name, model in models.items()}
    batches = {name: _batches(shape, pixels[name]) for name, shape in shapes.items()}
    contestants = {}
    with pinned(settings.threads):
        for name, model in models.items():
            if case.runtime in runtimes.ON_FILES:
                given = files[name].at(case.precision), batches[name], settings.threads, case.device
                contestants[name] = runtimes.file_runner(case.runtime, *given)
            else:
                kind = runtimes.TYPES[case.precision]
                model.to(case.device, kind).eval()
                inputs = [images.to(case.device, kind) for images in batches[name]]
                contestants[name] = runtimes.torch_runner(model, inputs, compiled=case.runtime == "compile")
        if case.runtime == "compile":
            _compile(contestants)
        length = len(next(iter(batches.values())))
        rounds = settings.rounds if length == 1 else length * max(PASSES, -(-settings.rounds // length))
        timings = interleave(contestants, rounds, advance=advance)
    del contestants
    if length > 1:
        timings = {name: timing.by_pass(length) for name, timing in timings.items()}
    peaks = dict.fromkeys(models)
    if settings.memory and case.runtime in ("eager", "onnx"):  # compilers' own memory would outweigh the model's
        for name, model in models.items():
            if keeps_any_number(model):
                notes.append(f"{name}: no peak memory, since the number of tokens differs from image to image")
                advance()
                continue
            try:
                peaks[name] = _peak(case, model, files[name], batches[name][0], settings.threads)
            except Exception as error:
                if not (isinstance(error, TosaError) or is_out_of_memory(error)):
                    raise
                notes.append(f"{name}, {case.runtime}: no peak memory: {gist(error)}")
            advance()
    return timings, peaks


def _batches(shape: tuple[int, ...], pixels: torch.Tensor | None) -> list[torch.Tensor]:
    """What a model is timed on: batches of real images, or one of noise."""
    if pixels is None:
        return [torch.randn(shape, generator=torch.Generator().manual_seed(0))]
    if len(pixels) < shape[0]:  # each of them more than once
        return [pixels[torch.arange(shape[0]) % len(pixels)]]
    return [batch for batch in pixels.split(shape[0]) if len(batch) == shape[0]]


def _peak(case: _Case, model: nn.Module, files: GraphFiles, images: torch.Tensor, threads: int) -> int | None:
    """Bytes; None of ONNX Runtime on a GPU, which does not tell."""
    if case.device == "cuda" and case.runtime == "onnx":
        return None
    if case.device == "cuda":
        return memory.on_gpu(model, images.to("cuda", runtimes.TYPES[case.precision]))
    place = files.at(case.precision) if case.runtime == "onnx" else files.folder / "run"
    if case.runtime == "eager" and not place.exists():
        runs.save(model, place)
    return memory.measure(place, case.runtime, tuple(images.shape), threads, case.precision)


def _compile(contestants: dict[str, Callable[[], None]]) -> None:
    """Let torch.compile do its work before timing starts."""
    torch._dynamo.reset()
    try:
        for contestant in contestants.values():
            contestant()
    except Exception as error:
        if isinstance(error, TosaError) or is_out_of_memory(error):
            raise
        raise _CompilerError(gist(error)) from error


def _figures(timings: dict[str, Timing], peaks: dict[str, int | None], macs: dict[str, int]) -> dict[str, dict]:
    reference = next(iter(timings))
    figures = {}
    for name, timing in timings.items():
        figures[name] = {
            "ms": 1e3 * timing.median,
            "ms_quartiles": [1e3 * value for value in timing.quartiles],
            "memory": peaks[name],
        }
        if name != reference:
            ratios = timing.speedups(timings[reference])
            speedup, ideal = Timing(ratios).median, macs[reference] / macs[name]
            figures[name] |= {
                "speedup": speedup,
                "speedup_quartiles": list(quartiles(ratios)),
                "ideal": ideal,
                "reached": speedup / ideal,
            }
    return figures
