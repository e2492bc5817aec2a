"""Tokens with long keys."""

import torch

from tosa_convert.methods.score import Score


class KeyNorm(Score):
    """The length of each token's key in each head."""

    def read(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """(B, H, N, D) twice → (B, H, N)."""
        return keys.norm(dim=-1)
