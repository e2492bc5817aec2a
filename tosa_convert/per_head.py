"""ToSA's Eq. 4 to the letter: each head attends over its own tokens."""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from tosa_convert.selective import grafted_class
from tosa_convert.tokens import gather_tokens, rejoin_tokens


@functools.cache
def per_head_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a host's attention in which each head attends over its own tokens.

    ToSA, Eq. 4: per head, the chosen tokens are replaced by their attention and the others pass
    that head's slice of the input through; the heads are concatenated, then projected.
    """

    def forward(self, *args, **kwargs):
        selection, host = self.selection, self.selection_host
        if not selection.active:
            return base.forward(self, *args, **kwargs)
        tokens = args[0] if args else kwargs["hidden_states"]
        queries, keys, values = host.project(self, tokens, kwargs)
        batch, heads, count, width = queries.shape
        chosen = selection.choice.attended
        parts = (part.flatten(0, 1) for part in (queries, keys, values))
        picked = [gather_tokens(part, chosen).unflatten(0, (batch, heads)) for part in parts]
        bias = host.bias(self, kwargs)
        if bias is not None:
            bias = _of_each_head(bias, chosen)
        dropout = host.attention_dropout(self) if self.training else 0.0
        attended = F.scaled_dot_product_attention(*picked, attn_mask=bias, dropout_p=dropout)
        slices = tokens.reshape(batch, count, heads, width).transpose(1, 2).flatten(0, 1)
        joined = rejoin_tokens(slices, chosen, attended.flatten(0, 1)).unflatten(0, (batch, heads))
        return host.finish(self, joined.transpose(1, 2).reshape(batch, count, heads * width), tokens)

    return grafted_class("PerHead", base, forward=forward)


def _of_each_head(bias: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """(1, H, N, N) for all pairs of tokens and each head's own, (B·H, K) → (B, H, K, K)."""
    heads = bias.shape[-3]
    batch = chosen.shape[0] // heads
    rows = gather_tokens(bias.expand(batch, -1, -1, -1).flatten(0, 1), chosen)
    return gather_tokens(rows.mT, chosen).mT.unflatten(0, (batch, heads))
