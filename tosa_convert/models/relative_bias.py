"""Relative positions: attention that adds a bias of its own for each pair of places to its logits."""

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import nn

from tosa_convert.models.adapter import Adapter
from tosa_convert.models.masks import total, weight_of
from tosa_convert.models.subclassing import answered


class OwnBias(NamedTuple):
    """A bias that a block makes for itself: the module and the name of its method that gives it, (1, H, N, N)."""

    holder: nn.Module
    method: str


class RelativeAdapter(Adapter):
    """The bias of the tokens that are there takes the place of the whole one while a block runs on some of them."""

    relative = True

    @abstractmethod
    def own_bias(self, block: nn.Module) -> OwnBias | None:
        """The bias that a block makes for itself, if it does."""

    def bias_arguments(self, kwargs: dict) -> tuple:
        """What its method is called with, in a block that is called with these keywords."""
        return ()

    def steered(self, block):
        own = self.own_bias(block)
        return [] if own is None else [tuple(own)]

    def mask(self, args, kwargs):
        """None: what comes with the call is the bias of positions."""
        return None

    def check_arguments(self, layer, args, kwargs):
        others = {name: value for name, value in kwargs.items() if name != self.bias_name}
        super().check_arguments(layer, args[1:], others)

    def call(self, block, forward, tokens, args, kwargs, places=None, sizes=None):
        kwargs = {**dict(zip((self.bias_name,), args, strict=False)), **kwargs}
        own = self.own_bias(block)
        made = None if own is None else getattr(own.holder, own.method)(*self.bias_arguments(kwargs))
        bias = total(made, kwargs.get(self.bias_name))
        if places is not None and bias is not None:
            bias = bias_at(bias, places)
        bias = total(bias, weight_of(sizes))
        if own is None:
            return forward(block, tokens, **{**kwargs, self.bias_name: bias})
        with answered(own.holder, lambda *args, **kwargs: bias, own.method):
            return forward(block, tokens, **{**kwargs, self.bias_name: None})


def bias_at(bias: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(1, H, N, N) or (H, N, N) for all pairs of tokens and places among them (B, K) → (B, H, K, K)."""
    batch, count = places.shape
    pairs = places[:, :, None] * bias.shape[-1] + places[:, None, :]
    taken = bias.reshape(bias.shape[-3], -1).index_select(1, pairs.reshape(-1))
    return taken.unflatten(1, (batch, count, count)).transpose(0, 1)
