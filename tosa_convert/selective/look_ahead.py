"""A layer's attention worked out before some of its tokens are fused (MCTF, arXiv 2403.10030, section 3.2).

The block runs up to its queries, keys and values on all tokens that enter it; who is fused may depend on the attention
that each token gets. The same attention then serves the fused tokens: summed over the keys of a group, which is the
attention of all tokens to the mean of its values; and a weighted mean over its queries.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from tosa_convert.methods.bypass import Groups
from tosa_convert.methods.token_ops import Choice, add_up, gather_tokens, stand_ins, wide
from tosa_convert.models.adapter import Adapter
from tosa_convert.models.branches import silenced
from tosa_convert.models.hooks import tapped
from tosa_convert.models.masks import total, weight_of
from tosa_convert.models.subclassing import Unheard, answered


class Ahead(NamedTuple):
    """The attention of the tokens that enter a layer.

    Attributes:
        weights: (B, H, N, N), from queries to keys.
        values: (B, H, N, D).
        received: (B, N), the attention that each token gets, the mean over heads and queries; where heads are mixed
            after their softmax, before that.
    """

    weights: torch.Tensor
    values: torch.Tensor
    received: torch.Tensor

    def fused(self, choice: Choice, shares: torch.Tensor) -> torch.Tensor:
        """What the groups of a choice get, (B, H, K, D).

        Args:
            shares: (B, N, 1) how much each token counts in its group.
        """
        batch, heads, count, width = self.values.shape
        means = _means(choice, shares, self.values.transpose(1, 2).flatten(2))
        each = gather_tokens(means, stand_ins(choice)).unflatten(2, (heads, width)).transpose(1, 2)
        found = (self.weights @ each).transpose(1, 2).flatten(2)
        return _means(choice, shares, found).unflatten(2, (heads, width)).transpose(1, 2)

    def map(self, choice: Choice, shares: torch.Tensor) -> torch.Tensor:
        """The attention among the groups of a choice, (B, H, K, K), for those who ask for it."""
        rows = _means(choice, shares, self.weights.transpose(1, 2).flatten(2)).unflatten(2, self.weights.shape[1::2])
        (summed,) = add_up(choice, rows.permute(0, 3, 2, 1).flatten(2))
        return summed.unflatten(2, rows.shape[2:0:-1]).permute(0, 2, 3, 1)


def _means(choice: Choice, shares: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """(B, N, D) → (B, K, D), the mean of each group."""
    summed, whole = add_up(choice, wide(tokens) * wide(shares), wide(shares))
    return (summed / whole).to(tokens.dtype)


Run = Callable[..., torch.Tensor]
"""A block's forward on some tokens: ``run(tokens, groups, sizes)``; without groups where no attention wants them."""


def look_ahead(adapter: Adapter, block: nn.Module, run: Run, tokens: torch.Tensor, groups: Groups, sizes) -> Ahead:
    """The attention of a block among the tokens that enter it, (B, N, C), without going on from there."""
    seen: list[Ahead] = []

    def attend(attention, queries, keys, values, bias):
        looks, weights = adapter.maps(attention, queries, keys, total(bias, weight_of(sizes)), sizes)
        dropout = adapter.attention_dropout(attention) if attention.training else 0.0
        received = looks.detach().mean((1, 2))
        seen.append(Ahead(F.dropout(weights, dropout) if dropout else weights, values, received))
        return torch.zeros_like(values[:, :, :1]), None

    attention = adapter.attention(block)
    by_parts = functools.partial(adapter.by_parts, attention, None)
    by_parts = by_parts if tapped(attention) else Unheard(by_parts)
    adapter.attending.set(attend)
    try:
        with answered(attention, by_parts), silenced(adapter.branches(block)[1]):
            run(tokens, groups, None)
    finally:
        adapter.attending.set(None)
    return seen[0]


def run_fused(
    adapter: Adapter, block: nn.Module, run: Run, ahead: Ahead, choice: Choice, shares: torch.Tensor, tokens
) -> torch.Tensor:
    """A block's own forward on the groups of a choice (B, K, C), whose attention is known already."""
    attention, attended = adapter.attention(block), ahead.fused(choice, shares)
    weights = ahead.map(choice, shares) if adapter.shows_attention else None

    def known(*args, **kwargs):
        normed = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        return adapter.finish(attention, attended.transpose(1, 2).flatten(2), normed, weights)

    with answered(attention, known):
        return run(tokens)
