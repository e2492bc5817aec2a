"""What a model is for: the labels of its images, how well it does on them, and what it can learn from them.

Each task is a file of this folder with a subclass of :class:`Task`; there is no list to edit. A task of your own is
known as soon as its class has been imported, and is asked before ours.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import nn

from tosa_convert.base import discovery
from tosa_convert.config.settings import FinetuneSettings
from tosa_convert.data.images import Augmentation, Images
from tosa_convert.models.preprocessing import Preprocessing

FOLDER = "tasks"


class Metric(NamedTuple):
    """A figure that a task measures on labelled images.

    Attributes:
        title: in tables.
        percent: whether it is a share, written as one.
        higher_is_better: False for an error.
    """

    title: str
    percent: bool = False
    higher_is_better: bool = True

    def loss(self, before: float, after: float) -> float:
        """By how much the second value is worse than the first."""
        return before - after if self.higher_is_better else after - before


class Task:
    """What a model is for. This class itself is for models without a head: it knows no labels.

    Attributes:
        metrics: name → metric; the first one decides where one has to.
    """

    metrics: ClassVar[Mapping[str, Metric]] = {}

    @classmethod
    def suits(cls, model: nn.Module) -> bool:
        """Whether the output of this model is one of this task."""
        return False

    def read(
        self,
        source: str | Path | None,
        preprocessing: Preprocessing,
        augment: str | Augmentation | None = None,
        seed: int = 0,
    ) -> Images:
        """The images of a folder, with their labels; see :class:`Images` for the arguments."""
        return Images(source, preprocessing, augment, seed)

    def has_labels(self, images: Images, model: nn.Module) -> bool:
        """Whether the images have labels of this task.

        Raises:
            UsageError: they have labels that look like it, but do not fit the model.
        """
        return False

    def measure(self, output: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """For each of :attr:`metrics` its value per image, (B,), of the model's main output."""
        return {}

    def loss(self, output: torch.Tensor, labels: torch.Tensor, settings: FinetuneSettings) -> torch.Tensor:
        """What fine-tuning on labels makes small: a scalar, of the model's main output."""
        raise NotImplementedError


def every_task() -> list[type[Task]]:
    """All that are known, those of users first."""
    for name in discovery.names(FOLDER):
        discovery.module(FOLDER, name)
    return sorted(discovery.subclasses(Task), key=lambda kind: kind.__module__.startswith(f"{__package__}."))


def task_of(model: nn.Module) -> Task:
    """What a model is for, converted or not."""
    return next((kind() for kind in every_task() if kind.suits(model)), Task())


def every_metric() -> dict[str, Metric]:
    """Those of all tasks."""
    return {name: metric for kind in reversed(every_task()) for name, metric in kind.metrics.items()}
