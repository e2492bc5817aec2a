"""From a float32 file to the one that is shipped: fewer bits, checked alike, each beside the others."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tosa_convert.base.environment import int8_instructions
from tosa_convert.base.errors import TosaWarning, UsageError, gist
from tosa_convert.base.progress import Progress
from tosa_convert.base.timing import Timing
from tosa_convert.config.settings import ExportSettings
from tosa_convert.data.images import Images
from tosa_convert.export.check import Check
from tosa_convert.export.gate import Judge, within_tolerance
from tosa_convert.export.quantization import Int8, to_float16
from tosa_convert.export.runtimes import onnx_runner
from tosa_convert.export.speed import inputs, note_speed, time_files
from tosa_convert.export.verification import Verifier
from tosa_convert.models.adapter import adapter_of

EXAMPLES = 32
"""Images on which operators are chosen."""
STATIC = "int8 static"
"""INT8 with calibrated ranges, where precision auto tries both kinds."""
CALIBRATION = "minmax"
"""How it is calibrated if no other way is asked for."""
LEAST = 8
"""Images to calibrate on."""
Make = Callable[[Path, int], list[str] | None]
"""Writes a file, chosen on so many images, and gives the operators that it left in float; None where no mix is near
enough, or there is no choice."""


class Chain:
    """The files of one model in fewer bits.

    Args:
        float32: the file of the model; others are written beside it. If :data:`tosa_convert.export.speed.BEFORE` lies
            there, the float32 file of the model before its conversion, it is timed with them.
        verifier: checks them.
        images: to calibrate on.
    """

    def __init__(self, float32: Path, verifier: Verifier, images: Images, settings: ExportSettings, progress: Progress):
        self.float32, self.verifier, self.images = float32, verifier, images
        self.settings, self.progress = settings, progress
        self.auto = settings.precision == "auto"
        self.files = {"float32": float32}
        self.makers: dict[str, Make] = {}
        self.left: dict[str, list[str] | None] = {}
        self.failed: dict[str, str] = {}

    def best(self) -> tuple[Path, Check]:
        """The file in the precision that is asked for; of precision auto the fastest that is near enough. The float32
        file and its check where that is wrong already."""
        if self.settings.precision in ("int8", "auto") and not int8_instructions():
            warnings.warn(
                "this processor has no instructions for products of 8 bits (such as VNNI), so INT8 may be no faster "
                "than float32 here; the table says how fast it is",
                TosaWarning,
                stacklevel=2,
            )
        for name in ["float16", "int8", STATIC] if self.auto else [self.settings.precision]:
            self._write(name)
        checks = self.verifier.check(self.files)
        if not checks["float32"].passed:
            return self.float32, checks["float32"]
        for name in self.makers:
            if self.left[name] is not None and not checks[name].passed and len(self.verifier.images) > EXAMPLES:
                checks[name] = self._on_all_images(name)
            checks[name].left = self.left[name] or []
        timings = time_files(self.files, self.verifier, self.settings, self.progress)
        for check in checks.values():
            note_speed(check, self.files, timings)
        if not self.auto:
            return self.files[self.settings.precision], checks[self.settings.precision]
        near = [name for name, check in checks.items() if check.passed]
        chosen = min(near, key=lambda name: timings[name].median)
        checks[chosen].tried = {name: _said(check, timings, name) for name, check in checks.items()} | self.failed
        return self.files[chosen], checks[chosen]

    def _write(self, name: str) -> None:
        """A file, if it can be made and run; with precision auto it may not."""
        file = self.float32.with_name(f"{name.replace(' ', '-')}.onnx")
        try:
            make = self._maker(name)
            left = make(file, EXAMPLES)
            onnx_runner(file, inputs(self.verifier, 1), self.settings.threads, "cpu")()
        except Exception as error:
            if not self.auto:
                raise
            self.failed[name] = f"cannot be had: {gist(error)}"
            return
        self.files[name], self.makers[name], self.left[name] = file, make, left

    def _on_all_images(self, name: str) -> Check:
        """The check of a file whose operators are chosen anew: what was near enough on some images is not on all."""
        self.left[name] = self.makers[name](self.files[name], len(self.verifier.images))
        return self.verifier.check({"float32": self.float32, name: self.files[name]})[name]

    def _maker(self, name: str) -> Make:
        if name == "float16":
            return lambda file, _: to_float16(self.float32, file)
        calibration = self.settings.calibration
        if self.auto:
            calibration = (calibration or CALIBRATION) if name == STATIC else None
        examples = None if calibration is None else self._to_calibrate()
        int8 = Int8(self.float32, self.float32.parent, calibration, examples, self.progress)
        if self.auto and calibration:  # slower than ranges found in each image, so far: tried as it is
            return lambda file, _: int8.write(file)
        model, task = self.verifier.model, self.verifier.task
        layers = len(adapter_of(model).blocks)

        def make(file: Path, count: int) -> list[str] | None:
            judge = Judge(model, task, self.verifier.examples(count), self.settings)
            return within_tolerance(int8, file, judge, layers, self.progress)

        return make

    def _to_calibrate(self) -> np.ndarray:
        """A batch as the file takes it: of images that are not checked, if there are enough of them.

        Raises:
            UsageError: there are too few, or there is nothing to be seen in them.
        """
        images, wanted = self.images, self.settings.calibration_images
        checked = set(self.verifier.images.indices)
        others = [place for place in range(len(images)) if place not in checked]
        places = others if len(others) >= wanted else range(len(images))
        taken = [images[place][0] for place in places[:: max(1, len(places) // wanted)]]
        found = [image for image in taken if image is not None][:wanted]
        if len(found) < LEAST:
            raise UsageError(
                f"{images.name} holds too few images to calibrate on ({len(found)} that can be read); give {LEAST} or "
                "more, better 32, of the kind that the model will see, or leave --calibration out"
            )
        stacked = torch.stack(found)
        if np.ptp(stacked.numpy(), axis=(2, 3)).max() == 0:
            raise UsageError(
                f"the images of {images.name} are each of one colour, so there are no ranges to calibrate; give images "
                "of the kind that the model will see, or leave --calibration out"
            )
        return self.verifier.ports.encoded(stacked).numpy()


def _said(check: Check, timings: dict[str, Timing], name: str) -> str:
    """What became of a precision, in words."""
    figures = ", ".join(f"{figure} {check.figures[figure]:.4f}" for figure in check.bounds)
    kept = f", {len(check.left)} operators in float" if check.left else ""
    outcome = "passed" if check.passed else "not near enough"
    return f"{outcome}: {1e3 * timings[name].median:.1f} ms{figures and f', {figures}'}{kept}"
