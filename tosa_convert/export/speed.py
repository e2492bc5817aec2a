"""How fast exported files are on this machine, one image at a time."""

import statistics
import time
from pathlib import Path

import torch

from tosa_convert.base.progress import Progress
from tosa_convert.base.timing import Timing, interleave, pinned
from tosa_convert.config.settings import ExportSettings
from tosa_convert.export import openvino
from tosa_convert.export.check import Check, bounds
from tosa_convert.export.files import size_of
from tosa_convert.export.gate import Judge
from tosa_convert.export.runtimes import ON_FILES, file_runner, onnx_runner, providers
from tosa_convert.export.verification import ORIGINAL, Verifier

SECONDS, ROUNDS = (3.0, 12.0), (5, 40)
"""How long files are timed, and in how many rounds: so many, or as many as fit into the first time, but no fewer than
the least and no longer than the second time."""
IMAGES = 8
EXAMPLES = 32
"""Images on which a file is compared with its model in another runtime."""
BEFORE = "original.onnx"
"""The float32 file of the model before its conversion."""


def inputs(verifier: Verifier, count: int) -> list[torch.Tensor]:
    """Up to ``count`` images as the files take them, one by one."""
    return [verifier.ports.encoded(image) for image in verifier.examples(count)]


def time_files(
    files: dict[str, Path], verifier: Verifier, settings: ExportSettings, progress: Progress
) -> dict[str, Timing]:
    """Each file's time for one image, in turn, by its precision; "original" that of :data:`BEFORE`, if it is there."""
    before = files["float32"].with_name(BEFORE)
    if before.exists():
        files = {ORIGINAL: before, **files}
    device = "cuda" if "CUDAExecutionProvider" in providers() else "cpu"
    batches = inputs(verifier, IMAGES)
    with pinned(settings.threads):
        runners = {name: onnx_runner(file, batches, settings.threads, device) for name, file in files.items()}
        for runner in runners.values():
            runner()
        started = time.perf_counter()
        for runner in runners.values():
            runner()
        short, long = (int(seconds / (time.perf_counter() - started)) for seconds in SECONDS)
        rounds = max(ROUNDS[0], min(long, max(ROUNDS[1], short)))
        with progress.track("time the files", rounds + 1) as advance:
            return interleave(runners, rounds, warmup=1, advance=advance)


def note_speed(check: Check, files: dict[str, Path], timings: dict[str, Timing]) -> None:
    """Add size and speed to the links of a check's chain."""
    reference = timings.get(ORIGINAL, timings["float32"])
    files = {ORIGINAL: files["float32"].with_name(BEFORE), **files}
    for link in check.chain:
        timing = timings.get(link["name"])
        if timing is not None:
            link["ms"] = 1e3 * timing.median
            link["speedup"] = statistics.median(timing.speedups(reference))
        if link["name"] in files:
            link["bytes"] = size_of(files[link["name"]])


def elsewhere(file: Path, verifier: Verifier, settings: ExportSettings) -> dict:
    """A file in OpenVINO: how near it is to the torch model there, and its time beside that in ONNX Runtime; see
    :attr:`Check.elsewhere`."""
    examples = list(verifier.examples(EXAMPLES))
    judge = Judge(verifier.model, verifier.task, examples, settings)
    run = openvino.compiled(file, settings.threads)
    figures = judge.figures(lambda feed: [torch.from_numpy(value) for value in run(feed)])
    given = file, inputs(verifier, IMAGES), settings.threads, "cpu"
    with pinned(settings.threads):
        timings = interleave({name: file_runner(name, *given) for name in ON_FILES}, 2 * ROUNDS[0])
    return {
        "runtime": "openvino",
        "images": len(examples),
        "figures": figures,
        "bounds": bounds(list(figures), settings),
        "ms": 1e3 * timings["openvino"].median,
        "ms_onnx": 1e3 * timings["onnx"].median,
    }
