"""The parts of the fine-tuning loss. One file each in :mod:`tosa_convert.training.losses`, named as in
:class:`~tosa_convert.config.settings.FinetuneSettings`, which holds their weights."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import nn

from tosa_convert.base import discovery
from tosa_convert.config.conversion import ConvertConfig
from tosa_convert.config.settings import FinetuneSettings
from tosa_convert.data.images import Images
from tosa_convert.methods.method import published
from tosa_convert.models.proof.calls import first_of
from tosa_convert.tasks.task import Task

FOLDER = "training/losses"


class Situation(NamedTuple):
    """What decides which losses there are.

    Attributes:
        model: converted.
        outputs: classes of its head, 0 without a classifier's.
        task: what it is for.
        labels: the weight of the loss on labels, which the others depend on; None until it is known.
    """

    settings: FinetuneSettings
    images: Images
    model: nn.Module
    outputs: int
    task: Task
    labels: float | None = None


class Loss(ABC):
    """One part of the loss, of a model that is being fine-tuned.

    Attributes:
        taught: whether it compares this batch with what the original model gives.
        teaches_selection: whether it is of use to what selects tokens alone: it is none while the head alone learns.
        masks: (B, H, W) of the batch, which pixels matter; None where the images have none.
    """

    taught: bool = False
    teaches_selection: bool = False
    masks: torch.Tensor | None = None

    def __init__(self, model: nn.Module, teacher: nn.Module, settings: FinetuneSettings):
        """
        Args:
            settings: with the weights of all losses filled in.
        """
        self.settings = settings

    @classmethod
    def name(cls) -> str:
        return cls.__module__.rsplit(".", 1)[-1]

    @classmethod
    def weight(cls, situation: Situation) -> float:
        """The weight that was asked for, or the one that suits.

        Raises:
            UsageError: it was asked for and cannot be had here.
        """
        asked = getattr(situation.settings, cls.name(), None)
        weight = cls.default(situation) if asked is None else asked
        if weight:
            cls.check(situation)
        return weight

    @classmethod
    def default(cls, situation: Situation) -> float:
        """The weight if none is asked for: that of the published method."""
        if cls.teaches_selection and situation.settings.head_only:
            return 0.0
        method = published().get(situation.model.tosa_config.method)
        return 0.0 if method is None else method.losses.get(cls.name(), 0.0)

    @classmethod
    def check(cls, situation: Situation) -> None:
        """Refuse what this loss is not for."""
        cls.fits(situation.model.tosa_config)

    @classmethod
    def fits(cls, config: ConvertConfig) -> None:
        """Refuse a conversion that it is not for."""
        return None

    def begin(self, images: torch.Tensor) -> None:
        """Before the forward pass on a batch of images (B, C, H, W), for what needs another one."""
        return None

    @abstractmethod
    def of(self, found: dict, wanted: dict, labels: torch.Tensor) -> torch.Tensor:
        """A scalar, of the forward pass that was just run.

        Args:
            found: what the model gave, see :meth:`tosa_convert.models.adapter.Adapter.outputs`.
            wanted: what the original gives, if :attr:`taught`.
            labels: (B,).
        """

    def close(self) -> None:
        """Take off what was put on the model."""
        return None


class LastTokens:
    """A hook that keeps the tokens that leave the last block."""

    value: torch.Tensor

    def __call__(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        self.value = first_of(output)


def every_loss() -> list[type[Loss]]:
    """Those of the folder."""
    modules = [discovery.module(FOLDER, name) for name in discovery.names(FOLDER)]
    kinds = [kind for module in modules for kind in vars(module).values() if isinstance(kind, type)]
    return [kind for kind in kinds if issubclass(kind, Loss) and kind.__module__.startswith(__package__ + ".losses.")]
