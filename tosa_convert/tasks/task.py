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
from tosa_convert.base.errors import UsageError
from tosa_convert.config.head import HeadConfig
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
        brief: whether it stands in tables of many models, too.
    """

    title: str
    percent: bool = False
    higher_is_better: bool = True
    brief: bool = True

    def loss(self, before: float, after: float) -> float:
        """By how much the second value is worse than the first."""
        return before - after if self.higher_is_better else after - before


class Task:
    """What a model is for. This class itself is for models without a head: it knows no labels.

    Attributes:
        metrics: name → metric; the first one decides where one has to.
        wants: what images with labels are, for messages.
        learns: whether models are trained on its labels, or only measured by them.
        takes_heads: whether a backbone may be put under a new head for it.
        error_is: what :meth:`error` is, for tables.
        unit: of the values of a map, such as "m".
        png_scale: what a value of a map is multiplied by in a PNG file; None for what fills 16 bits.
        differences: name → metric of how far an output is from the original's, of tasks whose output is a map.
        overall: name → metric of all images of a data set together, which is no mean over them.
    """

    metrics: ClassVar[Mapping[str, Metric]] = {}
    differences: ClassVar[Mapping[str, Metric]] = {}
    overall: ClassVar[Mapping[str, Metric]] = {}
    wants: ClassVar[str] = "labels"
    learns: ClassVar[bool] = True
    takes_heads: ClassVar[bool] = False
    error_is: ClassVar[str] = "squared distance of the map as a share of its variance"
    unit: ClassVar[str] = ""
    png_scale: ClassVar[float | None] = None

    @classmethod
    def name(cls) -> str:
        """What it is called with --task."""
        return cls.__module__.rsplit(".", 1)[-1]

    @classmethod
    def of(cls, model: nn.Module) -> "Task":
        """The task of a model that it suits."""
        return cls()

    @classmethod
    def head(cls, head: str, channels: int | None, max_depth: float | None) -> HeadConfig:
        """A new head for this task; of its options None are those that were not given.

        Raises:
            UsageError: an option is not for this task.
        """
        return HeadConfig(task=cls.name(), head=head, channels=channels or 1, max_depth=max_depth)

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

    def tally(self, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor | float:
        """What :meth:`concluded` needs of a batch; it is added up over all of them."""
        return 0.0

    def concluded(self, tally: torch.Tensor) -> dict[str, float]:
        """For each of :attr:`overall` its value."""
        return {}

    def known(self, labels: torch.Tensor) -> torch.Tensor:
        """Which images of a batch have a label, (B,) of bool; of maps those in which anything is known."""
        if labels.ndim < 3:
            return torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        return labels.isfinite().flatten(1).any(1)

    def loss(self, output: torch.Tensor, labels: torch.Tensor, settings: FinetuneSettings) -> torch.Tensor:
        """What fine-tuning on labels makes small: a scalar, of the model's main output."""
        raise NotImplementedError

    def difference(self, output: torch.Tensor, original: torch.Tensor) -> dict[str, torch.Tensor]:
        """For each of :attr:`differences` its value per image, (B,)."""
        return {}

    def error(self, output: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
        """Per image, (B,), what a plan makes small of a map: its squared distance as a share of the original's
        variance."""
        ours, theirs = output.flatten(1), original.flatten(1)
        return (ours - theirs).square().mean(1) / theirs.var(1).clamp(min=1e-12)

    def values(self, output: torch.Tensor) -> torch.Tensor:
        """(B, K, H, W), the model's output → (B, H, W), one number per pixel, as it is written to files."""
        return output[:, 0]

    def picture(self, output: torch.Tensor) -> torch.Tensor:
        """(B, K, H, W), the model's output → (B, H, W), as it is drawn."""
        return self.values(output)

    def imitation(self, output: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
        """What fine-tuning on the original's maps makes small, a scalar."""
        return self.error(output, original).mean()


def every_task() -> list[type[Task]]:
    """All that are known, those of users first."""
    for name in discovery.names(FOLDER):
        discovery.module(FOLDER, name)
    return sorted(discovery.subclasses(Task), key=lambda kind: kind.__module__.startswith(f"{__package__}."))


def task_of(model: nn.Module) -> Task:
    """What a model is for, converted or not."""
    return next((kind.of(model) for kind in every_task() if kind.suits(model)), Task())


def new_head(task: str, head: str, channels: int | None, max_depth: float | None) -> HeadConfig:
    """A new head for a task by its name; see :meth:`Task.head`.

    Raises:
        UsageError: there is no such task, or it is not one of new heads.
    """
    known = {kind.name(): kind for kind in reversed(every_task())}
    with_heads = sorted(name for name, kind in known.items() if kind.takes_heads)
    if task not in with_heads:
        why = f"task {task} takes no new head" if task in known else f"there is no task {task!r}"
        raise UsageError(f"{why}; give one of {', '.join(with_heads)}")
    return known[task].head(head, channels, max_depth)


def differences() -> dict[str, Metric]:
    """Those to the original's maps, of all tasks."""
    return {name: metric for kind in reversed(every_task()) for name, metric in kind.differences.items()}


def every_metric() -> dict[str, Metric]:
    """Those of all tasks, differences to the original among them."""
    known = reversed(every_task())
    return {name: it for kind in known for name, it in {**kind.overall, **kind.metrics}.items()} | differences()
