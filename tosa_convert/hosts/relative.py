"""Relative positions: attention that adds a bias of its own for each pair of places to its logits."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from tosa_convert.hosts import Host


class OwnBias(NamedTuple):
    """A bias that a block makes for itself, (1, H, N, N): the object and the name of its method that gives it."""

    holder: Any
    method: str
    value: torch.Tensor


class RelativeHost(Host):
    """The bias of the tokens that are there takes the place of the whole one while a block runs on some of them."""

    relative = True

    @abstractmethod
    def own_bias(self, block: nn.Module, kwargs: dict) -> OwnBias | None:
        """The bias that a block called with these keywords makes for itself, if it does."""

    def check_arguments(self, layer, args, kwargs):
        others = {name: value for name, value in kwargs.items() if name != self.bias_name}
        super().check_arguments(layer, args[1:], others)

    def call(self, block, forward, tokens, args, kwargs, places=None, sizes=None):
        kwargs = {**dict(zip((self.bias_name,), args, strict=False)), **kwargs}
        own = self.own_bias(block, kwargs)
        bias = total(None if own is None else own.value, kwargs.get(self.bias_name))
        if places is not None and bias is not None:
            bias = bias_at(bias, places)
        if sizes is not None:
            bias = total(bias, sizes.log()[:, None, None, :])
        if own is None:
            return forward(block, tokens, **{**kwargs, self.bias_name: bias})
        with replaced(own.holder, own.method, _Gives(bias)):
            return forward(block, tokens, **{**kwargs, self.bias_name: None})


class _Gives:
    def __init__(self, value: torch.Tensor | None):
        self.value = value

    def __call__(self, *args, **kwargs) -> torch.Tensor | None:
        return self.value


def total(*biases: torch.Tensor | None) -> torch.Tensor | None:
    """The sum of those that there are."""
    given = [bias for bias in biases if bias is not None]
    return sum(given[1:], given[0]) if given else None


def bias_at(bias: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(1, H, N, N) or (H, N, N) for all pairs of tokens and places among them (B, K) → (B, H, K, K)."""
    batch, count = places.shape
    pairs = places[:, :, None] * bias.shape[-1] + places[:, None, :]
    taken = bias.reshape(bias.shape[-3], -1).index_select(1, pairs.reshape(-1))
    return taken.unflatten(1, (batch, count, count)).transpose(0, 1)


@contextmanager
def replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    """Within this block an object's method is another one."""
    setattr(holder, name, value)
    try:
        yield
    finally:
        delattr(holder, name)
