"""From a checked float32 file to the one that is shipped: fewer bits, checked alike, each beside the others."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tosa_convert.base.errors import UsageError
from tosa_convert.base.progress import Progress
from tosa_convert.base.timing import Timing, interleave, pinned, processors
from tosa_convert.config.settings import ExportSettings
from tosa_convert.data.images import Images
from tosa_convert.export import openvino
from tosa_convert.export.check import Check, bounds
from tosa_convert.export.files import size_of
from tosa_convert.export.gate import Judge, within_tolerance
from tosa_convert.export.quantization import Int8, to_float16
from tosa_convert.export.runtimes import ON_FILES, file_runner, onnx_runner, providers
from tosa_convert.export.verification import ORIGINAL, Verifier
from tosa_convert.models.adapter import adapter_of

EXAMPLES = 32
"""Images on which operators are chosen."""
SECONDS, ROUNDS = 12.0, (5, 40)
"""How long files are timed, and in how many rounds at least and at most."""
BEFORE = "original.onnx"
"""The float32 file of the model before its conversion."""
STATIC = "minmax"
"""How ranges are calibrated where precision auto tries it and no other way is asked for."""


def smaller(
    float32: Path,
    verifier: Verifier,
    images: Images,
    settings: ExportSettings,
    progress: Progress,
) -> tuple[Path, Check]:
    """The file in the precision that the settings ask for, checked and timed with those that it comes from.

    Args:
        float32: the file of the converted model; others are written beside it. Where :data:`BEFORE` lies there, the
            float32 file of the model before its conversion, it is timed beside them.
        images: to calibrate on.
    """
    auto = settings.precision == "auto"
    names = ["float16", "int8", "int8 static"] if auto else [settings.precision]
    files = {"float32": float32, **{name: float32.with_name(f"{name.replace(' ', '-')}.onnx") for name in names}}
    makers, left, tried = {}, {}, {}
    for name in names:
        try:
            makers[name] = _maker(name, float32, verifier, images, settings, progress)
            left[name] = makers[name](files[name], EXAMPLES)
            onnx_runner(files[name], _inputs(verifier, 1), settings.threads, "cpu")()
        except Exception as error:
            if not auto:
                raise
            tried[name] = f"cannot be had: {' '.join(str(error).split())[:120]}"
            files.pop(name)
            makers.pop(name, None)
    checks = verifier.check(files)
    if not checks["float32"].passed:
        return float32, checks["float32"]
    for name, make in makers.items():
        if left[name] and not checks[name].passed and len(verifier.images) > EXAMPLES:
            # What was near enough on some of the images is not on all of them.
            left[name] = make(files[name], len(verifier.images))
            checks[name] = verifier.check({"float32": float32, name: files[name]})[name]
        checks[name].left = left[name] or []
    timings = _timed(files, verifier, float32.with_name(BEFORE), settings, progress)
    for name, check in checks.items():
        _note_speed(check, files, timings, name)
    chosen = settings.precision
    if auto:
        chosen = min((name for name in files if checks[name].passed), key=lambda name: timings[name].median)
        checks[chosen].tried = {name: _said(check, timings, name) for name, check in checks.items()} | tried
    return files[chosen], checks[chosen]


def _maker(
    name: str, float32: Path, verifier: Verifier, images: Images, settings: ExportSettings, progress: Progress
) -> Callable[[Path, int], list[str] | None]:
    """What writes the file of a precision, chosen on so many images, and gives the operators that it left in float:
    none of a precision that has no choice, None where no mix is near enough."""
    if name == "float16":
        return lambda file, _: to_float16(float32, file)
    auto, calibration = settings.precision == "auto", settings.calibration
    if auto:
        calibration = (calibration or STATIC) if name == "int8 static" else None
    examples = None if calibration is None else _to_calibrate(images, verifier, settings)
    int8 = Int8(float32, float32.parent, calibration, examples)
    if auto and calibration:  # slower than ranges found in each image, so far: tried as it is
        return lambda file, _: int8.write(file)
    layers = len(adapter_of(verifier.model).blocks)

    def make(file: Path, count: int) -> list[str] | None:
        judge = Judge(verifier.model, verifier.task, verifier.examples(count), settings)
        return within_tolerance(int8, file, judge, layers, progress)

    return make


def _to_calibrate(images: Images, verifier: Verifier, settings: ExportSettings) -> np.ndarray:
    """As the file takes them: of the images those that are not checked, if there are enough of them."""
    checked = set(verifier.images.indices)
    others = [place for place in range(len(images)) if place not in checked]
    places = others if len(others) >= settings.calibration_images else range(len(images))
    taken = [images[place][0] for place in places[:: max(1, len(places) // settings.calibration_images)]]
    found = [image for image in taken if image is not None][: settings.calibration_images]
    if len(found) < 4:
        raise UsageError(
            f"{images.name} holds {len(found)} images that can be read, too few to calibrate on; give 4 or more, "
            "better 32, of the kind that the model will see, or leave --calibration out"
        )
    stacked = torch.stack(found)
    if np.ptp(stacked.numpy(), axis=(2, 3)).max() == 0:
        raise UsageError(
            f"the images of {images.name} are each of one colour, so there are no ranges to calibrate; give images of "
            "the kind that the model will see, or leave --calibration out"
        )
    return verifier.ports.encoded(stacked).numpy()


def _inputs(verifier: Verifier, count: int) -> list[torch.Tensor]:
    """Up to ``count`` images as the files take them, one by one."""
    return [verifier.ports.encoded(image) for image in verifier.examples(count)]


def _timed(
    files: dict[str, Path],
    verifier: Verifier,
    before: Path,
    settings: ExportSettings,
    progress: Progress,
) -> dict[str, Timing]:
    """Each file's time for one image, in turn; by its precision, "original" that of the model before conversion."""
    if before.exists():
        files = {ORIGINAL: before, **files}
    if settings.threads > processors():
        raise UsageError(f"{settings.threads} threads are more than the {processors()} processors here")
    device = "cuda" if "CUDAExecutionProvider" in providers() else "cpu"
    batches = _inputs(verifier, 8)
    with pinned(settings.threads):
        runners = {name: onnx_runner(file, batches, settings.threads, device) for name, file in files.items()}
        for runner in runners.values():
            runner()
        started = time.perf_counter()
        for runner in runners.values():
            runner()
        least, most = ROUNDS
        rounds = min(most, max(least, int(SECONDS / (time.perf_counter() - started))))
        with progress.track("time the files", rounds + 1) as advance:
            return interleave(runners, rounds, warmup=1, advance=advance)


def elsewhere(file: Path, verifier: Verifier, settings: ExportSettings) -> dict:
    """A file in OpenVINO: how near it is to the torch model there, and its time beside that in ONNX Runtime."""
    examples = list(verifier.examples(EXAMPLES))
    judge = Judge(verifier.model, verifier.task, examples, settings)
    run = openvino.compiled(file, settings.threads)
    figures = judge.figures(lambda feed: [torch.from_numpy(value) for value in run(feed)])
    batches = _inputs(verifier, 8)
    with pinned(settings.threads):
        given = file, batches, settings.threads, "cpu"
        timings = interleave({name: file_runner(name, *given) for name in ON_FILES}, ROUNDS[0] * 2)
    return {
        "runtime": "openvino",
        "images": len(examples),
        "figures": figures,
        "bounds": bounds(list(figures), settings),
        "ms": 1e3 * timings["openvino"].median,
        "ms_onnx": 1e3 * timings["onnx"].median,
    }


def _note_speed(check: Check, files: dict[str, Path], timings: dict[str, Timing], name: str) -> None:
    """Add size and speed to the links of a check's chain."""
    reference = timings.get(ORIGINAL, timings["float32"])
    for link in check.chain:
        timing = timings.get(link["name"])
        if timing is not None:
            link["ms"] = 1e3 * timing.median
            link["speedup"] = statistics.median(timing.speedups(reference))
        if link["name"] in files:
            link["bytes"] = size_of(files[link["name"]])


def _said(check: Check, timings: dict[str, Timing], name: str) -> str:
    """What became of a precision, in words."""
    figures = ", ".join(f"{figure} {check.figures[figure]:.4f}" for figure in check.bounds)
    kept = f", {len(check.left)} operators in float" if check.left else ""
    outcome = "passed" if check.passed else "not near enough"
    return f"{outcome}: {1e3 * timings[name].median:.1f} ms{figures and f', {figures}'}{kept}"
