"""How an attention makes queries and keys of tokens, and what can be told from that before its layer runs."""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from tosa_convert.models.hooks import others_hook, unheard

if TYPE_CHECKING:
    from tosa_convert.models.adapter import Adapter


def split_heads(projected: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, N, H·D) → (B, H, N, D)."""
    return projected.unflatten(-1, (heads, -1)).transpose(1, 2)


class Affine(NamedTuple):
    """``weight @ token + bias``: how an attention makes queries or keys, all heads in a row."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class QueryKey(NamedTuple):
    """How an attention makes queries and keys.

    Attributes:
        as_they_are: whether it compares these as they are, without norms of their own or rotary positions.
    """

    query: Affine
    key: Affine
    as_they_are: bool

    @classmethod
    def of(cls, projections: list[nn.Module], as_they_are: bool, biases: tuple | None = None) -> "QueryKey | None":
        """Of two linear layers, or one that gives queries, keys and values in this order; None where they are none (any
        longer).

        Args:
            biases: of queries and keys, where they are kept elsewhere.
        """
        if any(
            type(each) is not nn.Linear or others_hook(each) or hasattr(each.weight, "__tensor_flatten__")
            for each in projections
        ):
            return None  # LoRA's, a quantiser's; or only the weight is one of a quantiser's tensors
        if len(projections) == 1:
            weights, own = projections[0].weight.chunk(3)[:2], projections[0].bias
            biases = (biases or (None, None)) if own is None else own.chunk(3)[:2]
        else:
            weights, biases = zip(*((each.weight, each.bias) for each in projections), strict=True)
        query, key = (Affine(*each) for each in zip(weights, biases, strict=True))
        return cls(query, key, as_they_are)


def projected(
    adapter: "Adapter", block: nn.Module, normed: torch.Tensor, arguments: dict
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries, scaled, and keys of the tokens that enter a layer, (B, H, N, D), before it runs.

    Args:
        normed: (B, N, C), the tokens as the layer's attention takes them.
        arguments: the keywords that the block is called with.
    """
    with unheard():
        queries, keys, _ = adapter.project(adapter.attention(block), normed, arguments)
    return queries * adapter.scale(queries), keys


def class_logits(adapter: "Adapter", block: nn.Module, normed: torch.Tensor, arguments: dict) -> torch.Tensor:
    """The logits of the class token's attention to every token that enters a layer, the mean over heads (IdleViT, arXiv
    2310.05654), without what the attention adds for each pair of places: (B, N). Arguments as of :func:`projected`."""
    attention = adapter.attention(block)
    made = adapter.query_and_key(attention)
    if made is not None and made.as_they_are:
        return _without_keys(adapter, made, normed)
    if made is None:
        queries, keys = projected(adapter, block, normed, arguments)
    else:
        width = len(made.query.weight) // adapter.heads
        queries = F.linear(normed[:, :1], *made.query).expand(-1, normed.shape[1], -1)
        pair = (split_heads(each, each.shape[-1] // width) for each in (queries, F.linear(normed, *made.key)))
        queries, keys = adapter.compared(attention, *pair, arguments)
        queries = queries[:, :, :1] * adapter.scale(queries)
    return (queries[:, :, :1] @ keys.mT).mean(1)[:, 0]


def _without_keys(adapter: "Adapter", made: QueryKey, normed: torch.Tensor) -> torch.Tensor:
    """:func:`class_logits` where nothing is done with queries and keys: the sum over heads is the product over all
    channels, and q·(Wx + b) = (Wᵀq)·x + q·b."""
    queries = F.linear(normed[:, :1], *made.query)
    queries = queries * (adapter.scale(split_heads(queries, adapter.heads)) / adapter.heads)
    logits = queries @ made.key.weight @ normed.mT
    return (logits if made.key.bias is None else logits + F.linear(queries, made.key.bias[None]))[:, 0]
