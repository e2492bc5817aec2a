"""The maps of a dense model as pictures: the original's, the converted one's, and their difference."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from tosa_convert.data.dense import with_channels
from tosa_convert.models.outputs import predict
from tosa_convert.tasks.task import Task, task_of

MOST = 99.0
"""Percentile that a scale ends at, so that a few pixels do not darken the rest."""


@dataclass(frozen=True)
class Panel:
    """A map to draw.

    Attributes:
        values: (H, W).
        low, high: ends of the scale.
        unit: of the values, such as "m"; empty for a share.
        difference: whether it is one.
    """

    title: str
    values: np.ndarray
    low: float
    high: float
    unit: str = ""
    difference: bool = False


def map_panels(model: nn.Module, before: nn.Module | None, images: torch.Tensor) -> list[list[Panel]]:
    """For each image (B, C, H, W) three panels, of a model that gives maps; without another, its map alone."""
    task = task_of(model)
    if before is None:
        return [[_one(task, values)] for values in _values(task, model, images)]
    theirs, ours = (_values(task, each, images) for each in (before, model))
    return [_three(task, *pair) for pair in zip(theirs, ours, strict=True)]


def _values(task: Task, model: nn.Module, images: torch.Tensor) -> np.ndarray:
    found = predict(model, images)[1]
    return task.picture(with_channels(found)).cpu().numpy()


def _one(task: Task, values: np.ndarray) -> Panel:
    return Panel("map", values, float(values.min()), float(np.percentile(values, MOST)), task.unit)


def _three(task: Task, theirs: np.ndarray, ours: np.ndarray) -> list[Panel]:
    low, high = float(min(theirs.min(), ours.min())), float(max(np.percentile(theirs, MOST), np.percentile(ours, MOST)))
    apart = np.abs(ours - theirs)
    furthest = max(float(np.percentile(apart, MOST)), 1e-6)
    return [
        Panel("original's map", theirs, low, high, task.unit),
        Panel("converted's map", ours, low, high, task.unit),
        Panel(
            f"difference, mean {apart.mean():.2g}{task.unit and f' {task.unit}'}", apart, 0.0, furthest, task.unit, True
        ),
    ]
