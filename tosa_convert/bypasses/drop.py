"""Skipped tokens are gone from here on: for classification by the class token only."""

import torch

from tosa_convert.passage import Groups
from tosa_convert.tokens import Choice, gather_tokens


def drop(tokens: torch.Tensor, choice: Choice, groups: Groups, weights: torch.Tensor | None):
    """(B, N, D) → (B, K, D); what was dropped has no group any more, so nothing is said of groups."""
    return gather_tokens(tokens, choice.attended), None
