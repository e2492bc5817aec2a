"""ToSA's Eq. 4 to the letter: each head attends over its own tokens."""

import torch
from torch import nn

from tosa_convert.methods.token_ops import gather_tokens, rejoin_tokens
from tosa_convert.models.adapter import Adapter


def attend_per_head(adapter: Adapter, attention: nn.Module, chosen: torch.Tensor, *args, **kwargs):
    """What an attention's forward gives when each head attends over its own tokens, ``chosen`` (B·H, K).

    ToSA, Eq. 4: per head, the chosen tokens are replaced by their attention and the others pass
    that head's slice of the input through; the heads are concatenated, then projected.
    """
    tokens = args[0] if args else kwargs["hidden_states"]
    queries, keys, values = adapter.project(attention, tokens, kwargs)
    batch, heads, count, width = queries.shape
    parts = (part.flatten(0, 1) for part in (queries, keys, values))
    picked = [gather_tokens(part, chosen).unflatten(0, (batch, heads)) for part in parts]
    bias = adapter.bias(attention, kwargs)
    if bias is not None:
        bias = _of_each_head(bias, chosen)
    attended, weights = adapter.attend(attention, *picked, bias)
    slices = tokens.reshape(batch, count, heads, width).transpose(1, 2).flatten(0, 1)
    joined = rejoin_tokens(slices, chosen, attended.flatten(0, 1)).unflatten(0, (batch, heads))
    joined = joined.transpose(1, 2).reshape(batch, count, heads * width)
    return adapter.finish(attention, joined, tokens, weights)


def _of_each_head(bias: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """(1, H, N, N) for all pairs of tokens and each head's own, (B·H, K) → (B, H, K, K)."""
    heads = bias.shape[-3]
    batch = chosen.shape[0] // heads
    rows = gather_tokens(bias.expand(batch, -1, -1, -1).flatten(0, 1), chosen)
    return gather_tokens(rows.mT, chosen).mT.unflatten(0, (batch, heads))
