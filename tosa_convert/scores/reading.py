"""Scorers whose reading is the score: nothing is left to do when the selective layer runs."""

import torch
from torch import nn


class ReadScore(nn.Module):
    """``read`` is a module, so that its work can be counted."""

    listens, chooses = True, False

    def __init__(self, read: nn.Module):
        super().__init__()
        self.read = read

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        """(B, H, N), as they were read."""
        return scores
