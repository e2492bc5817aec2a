"""Tokens with long keys."""

import torch
from torch import nn

from tosa_convert.scores.reading import ReadScore


class KeyLength(nn.Module):
    def forward(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """(B, H, N, D) twice → (B, H, N)."""
        return keys.norm(dim=-1)


class KeyNorm(ReadScore):
    """The length of each token's key in each head."""

    def __init__(self):
        super().__init__(KeyLength())
