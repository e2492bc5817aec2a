"""Tokens with long keys."""

import torch
from torch import nn


class KeyLength(nn.Module):
    def forward(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """(B, H, N, D) twice → (B, H, N)."""
        return keys.norm(dim=-1)


class KeyNorm(nn.Module):
    """The length of each token's key in each head."""

    listens, chooses = True, False

    def __init__(self):
        super().__init__()
        self.read = KeyLength()

    def forward(self, lengths: torch.Tensor) -> torch.Tensor:
        return lengths
