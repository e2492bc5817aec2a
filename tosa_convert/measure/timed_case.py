"""One case of a benchmark: models timed in turn, under the same conditions, and their peak memory."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from tosa_convert.base.errors import TosaError, gist, is_out_of_memory
from tosa_convert.base.timing import Timing, interleave, pinned
from tosa_convert.config.bench import BenchSettings
from tosa_convert.export import runtimes
from tosa_convert.export.graph_files import GraphFiles
from tosa_convert.measure import peak_memory as memory
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.runs import folder as runs
from tosa_convert.selective.selection import keeps_any_number

PASSES = 3
"""Over real images, at least."""
WARMUP = 2
"""Rounds before those that are timed."""
MEASURABLE = ("eager", "onnx")
"""Runtimes whose peak memory is the model's; compilers' own would outweigh it."""


@dataclass(frozen=True)
class Case:
    """The conditions that all models are timed under together."""

    runtime: str
    batch_size: int
    precision: str
    device: str

    def rounds(self, settings: BenchSettings, batches: int) -> int:
        """So many as are asked for with one batch; over several whole passes, since they take different times."""
        return settings.rounds if batches == 1 else max(PASSES, math.ceil(settings.rounds / batches))

    def steps(self, settings: BenchSettings, models: int, images: int | None) -> int:
        """How often :func:`time_case` advances, with so many images, or noise."""
        batches = max(1, (images or 0) // self.batch_size)
        peaks = models if settings.memory and self.runtime in MEASURABLE else 0
        return WARMUP + batches * self.rounds(settings, batches) + peaks


@dataclass(frozen=True)
class Timed:
    """What one case came to.

    Attributes:
        timings: of each model, of each round.
        peaks: of each model its peak memory in bytes, if it was measured.
        rounds: how many there are; of real images passes over all of them.
        images: how many images a pass has; None is noise.
    """

    timings: dict[str, Timing]
    peaks: dict[str, int | None]
    rounds: int
    images: int | None


class CompilerError(Exception):
    """torch.compile has no compiler, or fails on the model."""


def time_case(
    case: Case,
    models: dict[str, nn.Module],
    size: tuple[int, int],
    pixels: dict[str, torch.Tensor | None],
    settings: BenchSettings,
    files: dict[str, GraphFiles],
    advance: Callable,
    notes: list[str],
) -> Timed:
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
        first = next(iter(batches.values()))
        rounds, length = case.rounds(settings, len(first)), len(first)
        timings = interleave(contestants, rounds * length, WARMUP, advance)
    del contestants
    if length > 1:
        timings = {name: timing.by_pass(length) for name, timing in timings.items()}
    peaks = _peaks(case, models, batches, settings, files, advance, notes)
    real = next(iter(pixels.values())) is not None
    return Timed(timings, peaks, rounds, length * case.batch_size if real else None)


def _peaks(
    case: Case,
    models: dict[str, nn.Module],
    batches: dict[str, list[torch.Tensor]],
    settings: BenchSettings,
    files: dict[str, GraphFiles],
    advance: Callable,
    notes: list[str],
) -> dict[str, int | None]:
    peaks: dict[str, int | None] = dict.fromkeys(models)
    if not settings.memory or case.runtime not in MEASURABLE:
        return peaks
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
    return peaks


def _batches(shape: tuple[int, ...], pixels: torch.Tensor | None) -> list[torch.Tensor]:
    """What a model is timed on: batches of real images, or one of noise."""
    if pixels is None:
        return [torch.randn(shape, generator=torch.Generator().manual_seed(0))]
    if len(pixels) < shape[0]:  # each of them more than once
        return [pixels[torch.arange(shape[0]) % len(pixels)]]
    return [batch for batch in pixels.split(shape[0]) if len(batch) == shape[0]]


def _peak(case: Case, model: nn.Module, files: GraphFiles, images: torch.Tensor, threads: int) -> int | None:
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
        raise CompilerError(gist(error)) from error
