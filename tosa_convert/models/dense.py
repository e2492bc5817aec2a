"""A backbone under a head that makes a map of the image out of its tokens: depth, or masks.

Each head is a file of :mod:`tosa_convert.models.heads` with a subclass of :class:`Head`; there is no list to edit.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from tosa_convert.base import discovery
from tosa_convert.base.errors import UsageError
from tosa_convert.base.thread_local import PerThread
from tosa_convert.config.head import HeadConfig
from tosa_convert.models.adapter import Adapter, adapter_of
from tosa_convert.models.preprocessing import Preprocessing
from tosa_convert.models.proof.calls import first_of

FOLDER = "models/heads"
LEVELS = 4
"""Layers whose tokens a head of several scales reads: the last of each quarter of the backbone."""


class Head(nn.Module, ABC):
    """Maps of tokens → a map of the image, at any of its own sizes.

    Attributes:
        several: whether it reads :data:`LEVELS` layers, shallow ones first, or the last one alone.
    """

    several: ClassVar[bool] = True

    @abstractmethod
    def __init__(self, width: int, channels: int):
        """
        Args:
            width: channels of a token.
            channels: of the map.
        """

    @abstractmethod
    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        """Tokens of each layer on the grid of the patches, (B, C, rows, columns) each → (B, channels, H, W)."""


class DenseModel(nn.Module):
    """A backbone whose tokens a head turns into a map of the image's own size.

    Args:
        encoder: any supported model, without a head of its own.
        config: of the head; its weights are random, the same ones each time.
    """

    def __init__(self, encoder: nn.Module, config: HeadConfig):
        super().__init__()
        self.encoder, self.config = encoder, config
        self.adapter: Adapter = adapter_of(encoder)
        kind = head_class(config.head)
        depth = len(self.adapter.blocks)
        layers = sorted({-(-depth * part // LEVELS) for part in range(1, LEVELS + 1)}) if kind.several else [depth]
        if kind.several and len(layers) < LEVELS:
            raise UsageError(
                f"head {config.head} reads {LEVELS} layers, and this model has {depth}; use another head, such as light"
            )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.head = kind(self.adapter.width, config.channels)
        weight = next(encoder.parameters())
        self.head.to(weight.device, weight.dtype)
        self.keepers = [_Keeper() for _ in layers]
        for layer, keeper in zip(layers, self.keepers, strict=True):
            self.adapter.blocks[layer - 1].register_forward_hook(keeper)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) → the map, (B, channels, H, W): metres for depth, otherwise logits."""
        adapter = self.adapter
        adapter.outputs(images)
        size = images.shape[-2:]
        found = self.head([_on_grid(keeper.tokens.take(), adapter, size) for keeper in self.keepers])
        if torch.is_autocast_enabled(images.device.type):  # in half precision metres would come in coarse steps
            found = found.float()
        if self.config.max_depth is not None:
            found = self.config.max_depth * found.sigmoid()
        return F.interpolate(found, size=size, mode="bilinear", align_corners=False)


class _Keeper:
    """A hook that keeps what a block returns, in each thread its own."""

    def __init__(self):
        self.tokens = PerThread()

    def __call__(self, block: nn.Module, inputs: tuple, output: Any) -> None:
        self.tokens.set(first_of(output))


def _on_grid(output: torch.Tensor, adapter: Adapter, size: tuple[int, int]) -> torch.Tensor:
    """What leaves a block → its patches, (B, C, rows, columns)."""
    rows, columns = adapter.grid(size)
    patches = adapter.taken(output)[:, adapter.prefix :]
    return patches.mT.unflatten(-1, (rows, columns))


def heads() -> list[str]:
    """The names of those that there are."""
    return discovery.names(FOLDER)


def head_class(name: str) -> type[Head]:
    """
    Raises:
        UsageError: there is none of this name.
    """
    if name not in heads():
        raise UsageError(f"there is no head {name!r}; give one of {', '.join(heads())}")
    module = discovery.module(FOLDER, name)
    kinds = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, Head)]
    return next(kind for kind in kinds if kind.__module__ == module.__name__)


def with_head(
    encoder: nn.Module, config: HeadConfig, weights: dict[str, torch.Tensor] | None = None, place: str | Path = ""
) -> nn.Module:
    """A backbone under a head.

    Args:
        encoder: a model of timm without classes, or one of transformers, of which its base is taken.
        weights: of the head, or of a whole model with such a head; None leaves the new ones.
        place: where they come from, for messages.

    Raises:
        UsageError: the weights are those of another head, or of one on another backbone.
    """
    model: Any = DenseModel(_without_head(encoder), config)
    known = getattr(encoder, "tosa_origin", None)
    if known is not None:
        kept = known.spec if known.library == "timm" else {}  # of transformers it may be another class by now
        spec, seen = {**adapter_of(model).spec(), **kept}, whole_image(known.preprocessing)
        model.tosa_origin = known.model_copy(update={"spec": spec, "preprocessing": seen})
    if weights is not None:
        _fill(model.head, weights, config.head, place)
    return model.eval()


def whole_image(preprocessing: Preprocessing) -> Preprocessing:
    """The same, with nothing cut off: a map is one of the whole image."""
    return preprocessing.model_copy(update={"crop_mode": "squash", "crop_pct": 1.0})


def _without_head(encoder: nn.Module) -> nn.Module:
    """A model of transformers for a task without what it puts behind its base."""
    return getattr(encoder, "base_model", encoder) if "For" in type(encoder).__name__ else encoder


def _fill(head: nn.Module, weights: dict[str, torch.Tensor], name: str, place: str | Path) -> None:
    own = {key.removeprefix("head."): value for key, value in weights.items() if key.startswith("head.")} or weights
    wanted = head.state_dict()
    odd = [key for key, value in wanted.items() if key not in own or own[key].shape != value.shape]
    if not odd:
        head.load_state_dict({key: own[key] for key in wanted})
        return
    key = odd[0]
    found = f"has it {tuple(own[key].shape)}" if key in own else "has none"
    raise UsageError(
        f"{place} does not fit this head: {key} is {tuple(wanted[key].shape)} in head {name} on this backbone, and the "
        f"file {found}; give the weights of head {name} trained on a backbone of this width"
    )
