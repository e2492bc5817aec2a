"""transformers: DINOv3 ViT.

Its layers are called with the cosines and sines of the patches' positions.
"""

import torch
from torch import nn

from tosa_convert.models.adapter import Adapter
from tosa_convert.models.families.transformers_vit import TransformersVit, row_of_class
from tosa_convert.models.projections import split_heads
from tosa_convert.models.rotary import RotaryTap, positions_at, turn_halves

TRANSFORMERS = ("DINOv3ViTLayer",)
Positions = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, (N, D) of all patches, or (B, 1, N, D) of those of each image."""


def find(model: nn.Module) -> Adapter | None:
    row = row_of_class(model, TRANSFORMERS)
    return None if row is None else TransformersDinov3(model, row)


class TransformersDinov3(TransformersVit):
    relative = True

    def _prefix_tokens(self, block: nn.Module) -> int:
        return 1 + self.attention(block).config.num_register_tokens

    def tap(self, block, receive, detach=True):
        return _TurnedTap(self, block, receive, detach)

    def check_arguments(self, layer, args, kwargs):
        others = {name: value for name, value in kwargs.items() if name != "position_embeddings"}
        super().check_arguments(layer, args, others)

    def arguments(self, args, kwargs, places, sizes):
        args, kwargs = super().arguments(args, kwargs, places, sizes)
        if places is None:
            return args, kwargs
        patches = places[:, self.prefix :] - self.prefix
        taken = tuple(positions_at(each, patches) for each in kwargs["position_embeddings"])
        return args, {**kwargs, "position_embeddings": taken}

    def compared(self, attention, queries, keys, arguments):
        positions = arguments["position_embeddings"]
        return _turned(queries, positions, self.prefix), _turned(keys, positions, self.prefix)


def _turned(heads: torch.Tensor, positions: Positions, prefix: int) -> torch.Tensor:
    """(B, H, N, D) queries or keys, turned by the positions of their patches (RoFormer, arXiv 2104.09864)."""
    cosines, sines = positions
    return torch.cat([heads[:, :, :prefix], turn_halves(heads[:, :, prefix:], cosines, sines)], dim=2)


class _TurnedTap(RotaryTap):
    """On the projections of queries and keys."""

    def sources(self):
        return [*self.adapter.projections(self.attention)[:2], self.attention]

    def positions_in(self, args, kwargs):
        return kwargs["position_embeddings"]

    def turned(self, queries, keys, positions):
        pair = (split_heads(each, self.attention.num_heads) for each in (queries, keys))
        return tuple(_turned(each, positions, self.adapter.prefix) for each in pair)
