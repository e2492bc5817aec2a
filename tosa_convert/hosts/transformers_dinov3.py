"""transformers' DINOv3 ViT, whose layers are called with the cosines and sines of the patches' positions."""

import torch
from torch import nn

from tosa_convert.hosts import Host, Receive, Tap, positions_at, split_heads
from tosa_convert.hosts.transformers_vit import TransformersVit, layer_class, made_by_transformers, rows_of

TRANSFORMERS = ("DINOv3ViTLayer",)
Positions = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, (N, D) of all patches, or (B, 1, N, D) of those of each image."""


def find(model: nn.Module) -> Host | None:
    if not made_by_transformers(model):
        return None
    rows = rows_of(model, lambda layer: layer_class(layer, TRANSFORMERS) is not None)
    return TransformersDinov3(model, rows[0]) if len(rows) == 1 else None


class TransformersDinov3(TransformersVit):
    rotary = True

    def _prefix_tokens(self, block: nn.Module) -> int:
        return 1 + self.attention(block).config.num_register_tokens

    def tap(self, block: nn.Module, receive: Receive, detach: bool = True) -> list:
        attention = self.attention(block)
        tap = _TurnedTap(attention, receive, self.prefix, detach)
        return [
            attention.register_forward_pre_hook(tap.note_positions, with_kwargs=True),
            attention.q_proj.register_forward_hook(tap.take_queries),
            attention.k_proj.register_forward_hook(tap.take_keys),
        ]

    def take_along(self, layer, args, kwargs, places=None):
        others = {name: value for name, value in kwargs.items() if name != "position_embeddings"}
        super().take_along(layer, args, others)
        if places is None:
            return args, kwargs
        patches = places[:, self.prefix :] - self.prefix
        taken = tuple(positions_at(each, patches) for each in kwargs["position_embeddings"])
        return args, {**kwargs, "position_embeddings": taken}

    def project(self, attention, tokens, arguments):
        queries, keys, values = super().project(attention, tokens, arguments)
        positions = arguments["position_embeddings"]
        return _turned(queries, positions, self.prefix), _turned(keys, positions, self.prefix), values


def _turned(heads: torch.Tensor, positions: Positions, prefix: int) -> torch.Tensor:
    """(B, H, N, D) queries or keys, turned by the positions of their patches (RoFormer, arXiv 2104.09864)."""
    cosines, sines = positions
    patches = heads[:, :, prefix:]
    first, second = patches.chunk(2, dim=-1)
    turned = patches * cosines + torch.cat([-second, first], dim=-1) * sines
    return torch.cat([heads[:, :, :prefix], turned], dim=2)


class _TurnedTap(Tap):
    """Queries and keys as the attention compares them."""

    def __init__(self, attention: nn.Module, receive: Receive, prefix: int, detach: bool = True):
        super().__init__(attention, receive, detach)
        self.prefix = prefix
        self.positions: Positions | None = None
        self.queries: torch.Tensor | None = None

    def note_positions(self, attention: nn.Module, args: tuple, kwargs: dict) -> None:
        self.positions = kwargs["position_embeddings"]

    def take_queries(self, projection: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self.queries = output

    def take_keys(self, projection: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        pair, positions = (self.queries, output), self.positions
        self.queries = self.positions = None  # nothing of a forward pass stays behind in memory
        if positions is None:  # projected by someone else than the attention's own forward
            return
        heads = self.attention.num_heads
        pair = (split_heads(each.detach() if self.detach else each, heads) for each in pair)
        self.receive(*(_turned(each, positions, self.prefix) for each in pair))
