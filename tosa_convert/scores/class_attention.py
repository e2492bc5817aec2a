"""The tokens that the class token looks at (EViT, arXiv 2202.07800, section 3.1; IdleViT, arXiv 2310.05654)."""

import torch
from torch import nn

from tosa_convert.scores.reading import ReadScore


class ClassRow(nn.Module):
    """The class token's row of each head's attention map, the only one computed here."""

    def forward(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """(B, H, N, D) twice → (B, H, N)."""
        row = queries[:, :, :1] * queries.shape[-1] ** -0.5 @ keys.mT
        return row.softmax(-1)[:, :, 0]


class ClassAttention(ReadScore):
    """Attention from the first prefix token, the class token, to every token."""

    def __init__(self):
        super().__init__(ClassRow())
