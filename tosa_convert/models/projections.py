"""How an attention makes queries and keys of tokens, and what can be told from that before its layer runs."""

import functools
import inspect
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from tosa_convert.models.subclassing import plain_class

if TYPE_CHECKING:
    from tosa_convert.models.adapter import Adapter


def split_heads(projected: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, N, H·D) → (B, H, N, D)."""
    return projected.unflatten(-1, (heads, -1)).transpose(1, 2)


class Affine(NamedTuple):
    """``weight @ token + bias``: how an attention makes queries or keys, all heads in a row, where it does no more."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(cls, projection: nn.Module, part: slice = slice(None)) -> "Affine | None":
        """A part of what a projection gives; None where that is no plain linear layer (any longer)."""
        if type(projection) is not nn.Linear or hasattr(projection.weight, "__tensor_flatten__"):
            return None  # LoRA's, a quantiser's; or only the weight is one of a quantiser's tensors
        return cls(projection.weight[part], None if projection.bias is None else projection.bias[part])


def projected(
    adapter: "Adapter", block: nn.Module, normed: torch.Tensor, args: tuple, kwargs: dict
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of the tokens that enter a layer, (B, H, N, D), before it runs.

    Args:
        normed: (B, N, C), the tokens as the layer's attention takes them.
        args, kwargs: what the block is called with after its tokens.
    """
    arguments = {**dict(zip(_names(plain_class(block)), args, strict=False)), **kwargs}
    queries, keys, _ = adapter.project(adapter.attention(block), normed, arguments)
    return queries * adapter.scale(queries), keys


@functools.cache
def _names(block: type[nn.Module]) -> list[str]:
    """What a block's forward calls its arguments after itself and the tokens."""
    return list(inspect.signature(block.forward).parameters)[2:]


def class_logits(adapter: "Adapter", block: nn.Module, normed: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor:
    """The logits of the class token's attention to every token that enters a layer, the mean over heads (IdleViT, arXiv
    2310.05654), without what the attention adds for each pair of places: (B, N). Arguments as of :func:`projected`."""
    query, key = adapter.query_and_key(adapter.attention(block))
    if query is None or key is None:
        queries, keys = projected(adapter, block, normed, args, kwargs)
        return (queries[:, :, :1] @ keys.mT).mean(1)[:, 0]
    # The sum over heads is the product over all channels, and q·(Wx + b) = (Wᵀq)·x + q·b: no key is worked out.
    queries = F.linear(normed[:, :1], *query)
    queries = queries * (adapter.scale(split_heads(queries, adapter.heads)) / adapter.heads)
    logits = queries @ key.weight @ normed.mT
    return (logits if key.bias is None else logits + F.linear(queries, key.bias[None]))[:, 0]
