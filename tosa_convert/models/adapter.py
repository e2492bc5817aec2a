"""Adapters: a model seen as a row of blocks over tokens, whatever library made it. They know nothing about methods.

Each family is a file in :mod:`tosa_convert.models.families` that offers ``find(model) -> Adapter | None``; a new family
is a new file, and there is no list to edit. What none finds is proven (:mod:`tosa_convert.models.proven`) or refused.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from tosa_convert.base import discovery
from tosa_convert.base.errors import TosaError, UnsupportedModelError
from tosa_convert.models.branches import Branch, two_modules
from tosa_convert.models.by_parts import ByParts
from tosa_convert.models.hooks import Receive, Tap
from tosa_convert.models.masks import mask_at, total, weight_of
from tosa_convert.models.preprocessing import Preprocessing
from tosa_convert.models.projections import QueryKey
from tosa_convert.models.unsupported import why_not

TOKENS = ("hidden_states", "hidden_state", "x")
"""What blocks call the tokens that they take."""


class Adapter(ByParts, ABC):
    """A model seen as a row of blocks over tokens.

    Attributes:
        library: "timm" or "transformers".
        blocks: the layers, first to last; layer l is ``blocks[l - 1]``.
        prefix: number of class, distillation and register tokens in front of the patch tokens.
        class_token: whether the first of them is a class token.
        width: channels of a token.
        bias_name: the keyword by which a block's forward takes what is added to its attention's logits, also its first
            argument after the tokens, unless the model calls its blocks by keyword; None where there is none.
        relative: whether the attention itself looks at the places of tokens: rotary positions, a bias per pair.
        own_heads: whether a head's attention is softmax(QKᵀ) V of its own and no more, as per-head selection needs.
        gives_maps: whether what it gives are maps of the patches after several layers: every token is needed for them.
        halves: whether attention and MLP are modules of their own, one after the other, for tokens to be gone between.
        shows_attention: whether the model may be asked for its attention.
        windows: whether there are layers with attention in windows between its blocks.
        embeds: whether what looks like a classifier's head is the projection of an embedding.
        square: whether images of other sizes than the model's own have to be square.
    """

    library: str
    blocks: list[nn.Module]
    prefix: int
    class_token: bool
    width: int
    bias_name: str | None
    relative: bool = False
    own_heads: bool = True
    gives_maps: bool = False
    halves: bool = True
    square: bool = False
    shows_attention: bool = False
    windows: bool = False
    embeds: bool = False

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def attention(self, block: nn.Module) -> nn.Module:
        """The attention module of a block; not where neither :attr:`own_heads` nor :attr:`halves` holds."""
        return next(child for name, child in block.named_children() if name in ("attn", "attention", "self_attn"))

    def branches(self, block: nn.Module) -> tuple[Branch, Branch]:
        """Attention and MLP of a block, where :attr:`halves` holds."""
        mlp = next(child for name, child in block.named_children() if name in ("mlp", "ffn"))
        return two_modules(self.attention(block), mlp, self.as_attention_output)

    @abstractmethod
    def norm(self, block: nn.Module) -> nn.Module | None:
        """What normalises the tokens in front of a block's attention, if anything does."""

    def as_normed(self, normed: torch.Tensor) -> torch.Tensor:
        """Normed tokens (B, K, C) in the form in which :meth:`norm` gives them inside :meth:`call`."""
        return normed

    def normed(self, block: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        """The tokens as the block's attention takes them, (B, N, C)."""
        norm = self.norm(block)
        return tokens if norm is None else norm(tokens)

    @property
    @abstractmethod
    def patch_projection(self) -> nn.Module:
        """The module that gives the patches on their grid, (B, C, rows, columns) or, of videos, (B, C, times, rows,
        columns); or in a row with the grid, as ((B, N, C), (rows, columns))."""

    def grid_of(self, inputs: tuple, output: Any) -> tuple | None:
        """The grid of the patches in a forward pass, by what :attr:`patch_projection` took and gave."""
        return output[1] if isinstance(output, tuple) else output.shape[2:]

    @property
    @abstractmethod
    def classifies_by_class_token(self) -> bool:
        """Whether the model's output needs no patch tokens."""

    @property
    @abstractmethod
    def heads(self) -> int:
        """Attention heads of a block."""

    @abstractmethod
    def tap(self, block: nn.Module, receive: Receive, detach: bool = True) -> Tap:
        """Make each forward of a block call ``receive`` with its queries and keys; without gradients if ``detach``."""

    def steered(self, block: nn.Module) -> list[tuple[nn.Module, str]]:
        """The modules of a block, and their methods, that :meth:`call` answers for it on some of its tokens."""
        return []

    def given(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """What a block is called with after its tokens, without what means nothing."""
        return args, kwargs

    def entering(self, args: tuple, kwargs: dict) -> tuple[torch.Tensor, tuple, dict]:
        """What a block is called with → what holds its tokens, and the rest."""
        if args:
            return args[0], args[1:], kwargs
        name = next(name for name in TOKENS if name in kwargs)
        return kwargs[name], (), {other: value for other, value in kwargs.items() if other != name}

    def taken(self, entering: torch.Tensor) -> torch.Tensor:
        """What a block is called with as tokens (B, N, C), those that are no patches first."""
        return entering

    def padding(self, args: tuple, kwargs: dict) -> torch.Tensor | None:
        """Which tokens are none, (B, N), by the mask that a block is called with; None where all are tokens."""
        mask = self.mask(args, kwargs)
        if mask is None:
            return None
        seen = mask[:, 0]  # padding is what nobody sees
        hidden = seen < torch.finfo(seen.dtype).min / 2 if seen.is_floating_point() else ~seen.bool()
        return hidden.all(1)

    def restored(self, tokens: torch.Tensor, entering: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, C) in the order of :meth:`taken` → in the form and order of what the block was called with."""
        return tokens

    def given_back(self, tokens: torch.Tensor) -> Any:
        """What a block's forward returns when these tokens leave it, in the form in which they entered."""
        return tokens

    def check_arguments(self, layer: int, args: tuple, kwargs: dict) -> None:
        """Look at what a block is called with after its tokens.

        Raises:
            TosaError: something in it is per token, and it is not known how to take it along.
        """
        mask = self.mask(args, kwargs)
        of_padding = mask is not None and mask.ndim == 4 and mask.shape[1] == 1
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and not (value is mask and of_padding):
                raise TosaError(
                    f"selective layer {layer} was called with a mask or per-token positions of a form that is not "
                    "known; run the model without an attention mask, or with one of (B, 1, N, N)"
                )

    def arguments(
        self, args: tuple, kwargs: dict, places: torch.Tensor | None, sizes: torch.Tensor | None
    ) -> tuple[tuple, dict]:
        """A block's arguments after its tokens, when these are not all of the tokens; see :meth:`call`."""
        mask = None if places is None else self.mask(args, kwargs)
        if sizes is None and mask is None:
            return args, kwargs
        added = None if mask is None else mask_at(mask, places, next(self.model.parameters()).dtype)
        return args[1:], {**kwargs, self.bias_name: total(added, weight_of(sizes))}

    def mask(self, args: tuple, kwargs: dict) -> torch.Tensor | None:
        """Who sees whom, among a block's arguments after its tokens."""
        given = None if self.bias_name is None else kwargs.get(self.bias_name, args[0] if args else None)
        return given if isinstance(given, torch.Tensor) else None

    def call(
        self,
        block: nn.Module,
        forward: Callable,
        tokens: torch.Tensor,
        args: tuple,
        kwargs: dict,
        places: torch.Tensor | None = None,
        sizes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run a block's own forward on some of its tokens, (B, K, C) → (B, K, C).

        Args:
            args, kwargs: what the block was called with after its tokens.
            places: (B, K) which of the tokens these are; None where all are there, or their places do not matter.
            sizes: (B, K) for how many tokens each stands; the attention then weighs it by that (ToMe's proportional
                attention, arXiv 2210.09461, section 3.3).
        """
        args, kwargs = self.arguments(args, kwargs, places, sizes)
        return forward(block, tokens, *args, **kwargs)

    def query_and_key(self, attention: nn.Module) -> QueryKey | None:
        """How :meth:`project` makes queries and keys before they are :meth:`compared`, where that is linear."""
        return None

    def compared(self, attention: nn.Module, queries: torch.Tensor, keys: torch.Tensor, arguments: dict):
        """Queries and keys (B, H, N, D) as the attention compares them, with its norms and rotary positions."""
        return queries, keys

    @abstractmethod
    def as_attention_output(self, tokens: torch.Tensor, weights: torch.Tensor | None = None):
        """Tokens (B, N, C), and the weights of the attention, in the form in which its forward returns them."""

    def prepare(self) -> None:
        """Hook the model where it has to be steered once it is converted."""
        return None

    @property
    def forward(self) -> Callable:
        """What takes :meth:`inputs`: the model, or for a model of images and texts its image branch."""
        return self.model

    @abstractmethod
    def inputs(self, images: torch.Tensor) -> dict:
        """The keywords with which :attr:`forward` takes these images."""

    @abstractmethod
    def outputs(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the model. With a head {"logits": (B, classes)}, or the head's own output under its own name; without
        one {"tokens": (B, N, C), "features": (B, C)}."""

    @abstractmethod
    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Features of images (B, N, C), prefix tokens first, after the last norm where the library applies one."""

    @abstractmethod
    def preprocessing(self) -> Preprocessing:
        """What the model itself knows of its images: size, channels, mean and deviation."""

    @abstractmethod
    def resize(self, size: tuple[int, int]) -> None:
        """Make the model take images of this size (H, W), resampling position embeddings if it must."""

    @abstractmethod
    def spec(self) -> dict:
        """JSON-able arguments that build this model's class again; see :func:`tosa_convert.models.provenance.build`."""

    def exporting(self) -> AbstractContextManager:
        """Within this block the model is fit to be exported."""
        return nullcontext()

    def any_size(self) -> AbstractContextManager:
        """Within this block the model takes images of any size that is cut into whole patches, if it can be made to."""
        return nullcontext()

    @property
    @abstractmethod
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""

    def grid(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Rows and columns of the patches of images of this size (H, W); of a model of videos, times before them."""
        return tuple(side // patch for side, patch in zip(size, self.patch, strict=True))

    def patches(self, size: tuple[int, int]) -> int:
        """How many patches images of this size (H, W) are cut into."""
        return math.prod(self.grid(size))

    def fits(self, size: tuple[int, int]) -> bool:
        """Whether images of this size (H, W) are cut into whole patches, or are of the model's own size."""
        whole = not any(side % patch for side, patch in zip(size, self.patch, strict=True))
        return whole or tuple(size) == tuple(self.preprocessing().size)  # where patches overlap


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter of a model.

    Raises:
        UnsupportedModelError: no family finds it; the message says why it cannot be converted.
    """
    for module in (*families(), discovery.module("models", "proven")):  # what is not known by name is proven
        adapter = module.find(model)
        if adapter is not None:
            return adapter
    raise UnsupportedModelError(why_not(model))


@functools.cache
def families() -> list:
    """The modules of the folder of families that find models."""
    folder = "models/families"
    modules = [discovery.module(folder, name) for name in discovery.names(folder)]
    return [module for module in modules if hasattr(module, "find")]


def run(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """:meth:`Adapter.outputs` of a model of any supported library; the images take the type of its weights."""
    return adapter_of(model).outputs(images.to(next(model.parameters()).dtype))
