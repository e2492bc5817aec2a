"""An attention worked out from its parts, for those who need what is between them."""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tosa_convert.base.thread_local import PerThread
from tosa_convert.models.masks import total, weight_of


class ByParts(ABC):
    """What an adapter knows of how an attention goes: its queries, keys and values, its map, and what follows.

    Attributes:
        attending: what this thread has in the place of :meth:`attend`.
    """

    def __init__(self) -> None:
        self.attending = PerThread()

    def by_parts(self, attention: nn.Module, sizes: torch.Tensor | None, *args: Any, **kwargs: Any):
        """What an attention's forward gives, from :meth:`project`, :meth:`bias`, :meth:`attend` (or what this thread's
        :attr:`attending` has in its place) and :meth:`finish`; with sizes as in :meth:`Adapter.call`."""
        tokens = args[0] if args else kwargs["hidden_states"]
        bias = total(self.bias(attention, kwargs), weight_of(sizes))
        attend = self.attending.get() or self.attend
        joined, weights = attend(attention, *self.project(attention, tokens, kwargs), bias)
        return self.finish(attention, joined.transpose(1, 2).flatten(2), tokens, weights)

    def scale(self, queries: torch.Tensor) -> float:
        """What products of queries (B, H, N, D) with keys are multiplied by."""
        return queries.shape[-1] ** -0.5

    @abstractmethod
    def project(
        self, attention: nn.Module, tokens: torch.Tensor, arguments: dict
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, N, C) and the other keywords of the attention's call → queries, keys, values, each (B, H, N, D)."""

    def bias(self, attention: nn.Module, arguments: dict) -> torch.Tensor | None:
        """What the attention adds to its logits for each pair of places, (1, H, N, N), if anything.

        Args:
            arguments: the keywords of the attention's call.
        """
        return None

    def attend(
        self,
        attention: nn.Module,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """softmax(QKᵀ / √D + bias) V, each (B, H, N, D), and the weights (B, H, N, N) if the attention returns them."""
        dropout = self.attention_dropout(attention) if attention.training else 0.0
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, dropout_p=dropout), None

    def maps(
        self,
        attention: nn.Module,
        queries: torch.Tensor,
        keys: torch.Tensor,
        bias: torch.Tensor | None,
        sizes: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The softmax of the logits, (B, H, N, N), and what each token takes of each value: the same, where no head is
        mixed with others.

        Args:
            bias: what is added to the logits, log sizes included.
            sizes: (B, N) for how many tokens each stands.
        """
        logits = queries * self.scale(queries) @ keys.mT
        found = (logits if bias is None else logits + bias).softmax(-1)
        return found, found

    @abstractmethod
    def finish(
        self, attention: nn.Module, joined: torch.Tensor, tokens: torch.Tensor, weights: torch.Tensor | None = None
    ):
        """What the attention does after its heads: (B, N, C) of concatenated heads → what its forward returns."""

    @abstractmethod
    def attention_dropout(self, attention: nn.Module) -> float:
        """Dropout on the attention weights while training."""
