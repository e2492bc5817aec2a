"""The measured speed-up of a conversion, against the one expected from its MACs."""

import tempfile
from itertools import product
from pathlib import Path

import torch
from torch import nn

from tosa_convert.base.distributed import pick_device
from tosa_convert.base.environment import machine
from tosa_convert.base.errors import TosaError, UsageError, is_out_of_memory
from tosa_convert.base.progress import Progress
from tosa_convert.base.timing import Timing, check_threads, quartiles
from tosa_convert.config.bench import BenchSettings
from tosa_convert.data.sampling import sample
from tosa_convert.export import runtimes
from tosa_convert.export.graph_files import GraphFiles
from tosa_convert.measure.macs import Cost, flops
from tosa_convert.measure.timed_case import Case, CompilerError, Timed, time_case
from tosa_convert.models.adapter import adapter_of
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.runs.loading import set_image_size
from tosa_convert.selective.selection import keeps_any_number


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
        "precision", "rounds" (of real images passes over all of them), "images" (how many those are, or None) and per
        model "ms" (median), "ms_quartiles", "memory" (bytes or None) and, against the reference, "speedup" (median over
        rounds), "speedup_quartiles", "ideal" and "reached". "ideal" is the ratio of MACs excluding selector cost;
        "reached" is the share speedup / ideal.
    """
    settings, device = settings or BenchSettings(), pick_device(device)
    _check(models, settings, device)
    lacking = {name: why for name in settings.runtimes if (why := runtimes.missing(name, device))}
    notes = [f"{name} is left out: {why}" for name, why in lacking.items()]
    possible = [name for name in settings.runtimes if name not in lacking]
    if not possible:
        raise UsageError(f"nothing can be timed: {'; '.join(f'{name}: {why}' for name, why in lacking.items())}")
    kinds = [
        Case(runtime, batch, precision, device)
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
    progress = progress or Progress()
    for size in sizes:
        with progress.busy("count multiply–adds"):
            for model in models.values():
                if preprocessing_of(model).size != size:
                    set_image_size(model, size)
                model.to(device)  # where counting is quicker too
            pixels = dict.fromkeys(models) if anything else _pixels(models, data, images)
            costs = {name: _cost(model, pixels[name]) for name, model in models.items()}
        macs = {name: cost.macs - cost.selectors for name, cost in costs.items()}
        notes += [_spread(name, cost, data) for name, cost in costs.items() if cost.images]
        found = next(iter(pixels.values()))
        steps = sum(case.steps(settings, len(models), None if found is None else len(found)) for case in kinds)
        with tempfile.TemporaryDirectory() as scratch, progress.track("bench", steps) as advance:
            given = (files or {}) if settings.sizes is None else {}
            graphs = {
                name: GraphFiles(model, Path(scratch) / str(index), settings.opset, given.get(name))
                for index, (name, model) in enumerate(models.items())
            }
            for case in kinds:
                try:
                    _check_alone(models, case)
                    timed = time_case(case, models, size, pixels, settings, graphs, advance, notes)
                except _NoBatchError as error:
                    notes.append(str(error))
                except CompilerError as error:
                    notes.append(f"torch.compile does not work here: {error}")
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    left_out = f"{case.runtime}, {case.precision}, batch {case.batch_size}, {size[0]}×{size[1]} px"
                    notes.append(f"{left_out} is left out: it does not fit into memory")
                else:
                    cases.append(
                        {
                            "runtime": case.runtime,
                            "batch_size": case.batch_size,
                            "size": list(size),
                            "precision": case.precision,
                            "rounds": timed.rounds,
                            "images": timed.images,
                            "models": _figures(timed, macs),
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


def _check_alone(models: dict[str, nn.Module], case: Case) -> None:
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


def _figures(timed: Timed, macs: dict[str, int]) -> dict[str, dict]:
    reference = next(iter(timed.timings))
    figures = {}
    for name, timing in timed.timings.items():
        figures[name] = {
            "ms": 1e3 * timing.median,
            "ms_quartiles": [1e3 * value for value in timing.quartiles],
            "memory": timed.peaks[name],
        }
        if name != reference:
            ratios = timing.speedups(timed.timings[reference])
            speedup, ideal = Timing(ratios).median, macs[reference] / macs[name]
            figures[name] |= {
                "speedup": speedup,
                "speedup_quartiles": list(quartiles(ratios)),
                "ideal": ideal,
                "reached": speedup / ideal,
            }
    return figures
