"""Which operators stay in float, so that an INT8 file is as near to its model as it has to be."""

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import onnxruntime
import torch
from torch import nn

from tosa_convert.base.progress import Progress
from tosa_convert.config.settings import ExportSettings
from tosa_convert.export.check import bounds, closeness, margin
from tosa_convert.export.ports import Ports
from tosa_convert.export.quantization import Int8
from tosa_convert.export.verification import run_session
from tosa_convert.models.adapter import run as run_model
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.tasks.task import Task

RANKED = 8
"""Images on which the harm of each operator is measured."""


class Judge:
    """How near a file is to the model that it was made of, on a few images."""

    def __init__(self, model: nn.Module, task: Task, images: Iterable[torch.Tensor], settings: ExportSettings):
        self.model, self.task, self.settings, images = model, task, settings, list(images)
        ports = Ports(preprocessing_of(model), settings.raw_input)
        self.feeds = [ports.feed(image) for image in images]
        with torch.no_grad():
            self.wanted = [next(iter(run_model(model, image).items())) for image in images]

    def margin(self, file: Path, images: int | None = None) -> float:
        """By how much it is within the tolerance, on all images or the first few; below 0 if it is not."""
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        figures = self.figures(functools.partial(run_session, session), images)
        return margin(figures, bounds(list(figures), self.settings))

    def figures(self, run: Callable[[dict], list[torch.Tensor]], images: int | None = None) -> dict[str, float]:
        """How near what ``run`` gives is to the model, means over the images."""
        sums: dict[str, float] = {}
        feeds, wanted = self.feeds[:images], self.wanted[:images]
        for feed, (kind, main) in zip(feeds, wanted, strict=True):
            for name, value in closeness(self.model, self.task, kind, run(feed)[0], main).items():
                sums[name] = sums.get(name, 0.0) + value.item() / len(feeds)
        return sums


def within_tolerance(int8: Int8, file: Path, judge: Judge, layers: int, progress: Progress) -> list[str] | None:
    """Write the file with as few operators in float as it takes; gives their names, or None where no mix is near
    enough, and the file is as it would be with all operators quantised.

    First whole layers are left in float, those first which hurt most when they alone are quantised; then, of what was
    left, as many operators as possible are quantised again.

    Args:
        layers: of the model. Operators run one layer after the other, so that a layer's are neighbours.
    """
    int8.write(file)
    if judge.margin(file) >= 0:
        return []
    size = -(-len(int8.operators) // layers)
    groups = [int8.operators[start : start + size] for start in range(0, len(int8.operators), size)]
    kept = _fewest(int8, file, judge, _by_harm(int8, file, judge, groups, progress), progress)
    singles = [[name] for group in kept for name in group]
    kept = _fewest(int8, file, judge, _by_harm(int8, file, judge, singles, progress), progress)
    if len(kept) == len(int8.operators):  # it would be the float32 file
        int8.write(file)
        return None
    left = [name for group in kept for name in group]
    int8.write(file, left)
    return left


def _by_harm(
    int8: Int8, file: Path, judge: Judge, groups: Sequence[Collection[str]], progress: Progress
) -> list[Collection[str]]:
    """Groups of operators, those first which do most harm when they alone are quantised."""
    margins = []
    with progress.track("operators that hurt", len(groups)) as advance:
        for group in groups:
            int8.write(file, [name for name in int8.operators if name not in group])
            margins.append(judge.margin(file, RANKED))
            advance()
    return [group for _, group in sorted(zip(margins, groups, strict=True), key=lambda pair: pair[0])]


def _fewest(
    int8: Int8, file: Path, judge: Judge, groups: list[Collection[str]], progress: Progress
) -> list[Collection[str]]:
    """The fewest of these groups, from the first, with which in float the file is within the tolerance; all of them
    where fewer do not suffice."""

    def suffices(count: int) -> bool:
        int8.write(file, [name for group in groups[:count] for name in group])
        return judge.margin(file) >= 0

    return groups[: _first(suffices, len(groups), progress)]


def _first(holds: Callable[[int], bool], most: int, progress: Progress) -> int:
    """The least number from 1 that holds, by halving; ``most`` if no smaller one does."""
    low, high = 1, most
    with progress.track("operators left in float", most.bit_length()) as advance:
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(middle) else (middle + 1, high)
            advance()
    return low
