"""Relative positions: attention that adds a bias of its own for each pair of places to its logits."""

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import nn

from tosa_convert.methods.token_ops import flat_positions
from tosa_convert.models.adapter import Adapter
from tosa_convert.models.masks import total, weight_of
from tosa_convert.models.subclassing import answered, is_answered


class OwnBias(NamedTuple):
    """A bias that a block makes for itself: the module and the name of its method that gives it, (1, H, N, N)."""

    holder: nn.Module
    method: str


class RelativeAdapter(Adapter):
    """The bias of the tokens that are there takes the place of the whole one while a block runs on some of them.

    Between two groups of merged tokens it is the mean over the pairs of their tokens, which is nearer to the original
    than the bias between the two tokens that the others joined (``benchmarks/group_places.py``).
    """

    relative = True

    def silenced(self, attention: nn.Module) -> bool:
        """Whether something answers for an attention that does not work it out."""
        return is_answered(attention) and self.attending.get() is None

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

    def call(self, block, forward, tokens, args, kwargs, places=None, sizes=None, members=None):
        """As :meth:`tosa_convert.models.adapter.Adapter.call`.

        Args:
            members: (B, N) in which of the tokens each of the image is, once some were merged.
        """
        kwargs = {**dict(zip((self.bias_name,), args, strict=False)), **kwargs}
        own = self.own_bias(block)
        made = None if own is None else getattr(own.holder, own.method)(*self.bias_arguments(kwargs))
        bias = total(made, kwargs.get(self.bias_name))
        if bias is not None and members is not None:
            bias = mean_bias(bias, members, tokens.shape[1])
        elif bias is not None and places is not None:
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


def mean_bias(bias: torch.Tensor, members: torch.Tensor, count: int) -> torch.Tensor:
    """(1, H, N, N) or (H, N, N) for all pairs of tokens → (B, H, K, K), the mean over the pairs of two groups' tokens.

    Args:
        members: (B, N) in which of the K groups each token is.
        count: K.
    """
    (batch, tokens), heads = members.shape, bias.shape[-3]
    (groups,) = flat_positions(count, members)

    def summed(values: torch.Tensor) -> torch.Tensor:
        """(B, N, ·) → (B, K, ·)."""
        width = values.shape[-1]
        found = values.new_zeros(batch * count, width).index_add(0, groups, values.reshape(batch * tokens, width))
        return found.reshape(batch, count, width)

    whole = bias.float().reshape(heads, tokens, tokens).permute(1, 2, 0)  # half precision does not count so far
    sizes = summed(whole.new_ones(batch, tokens, 1))
    rows = summed(whole.reshape(1, tokens, tokens * heads).expand(batch, -1, -1)) / sizes
    columns = rows.reshape(batch, count, tokens, heads).transpose(1, 2).reshape(batch, tokens, count * heads)
    return (summed(columns) / sizes).reshape(batch, count, count, heads).permute(0, 3, 2, 1).to(bias.dtype)
