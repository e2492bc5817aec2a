"""A skipped token adds the update that its most similar attended token received."""

from collections.abc import Callable

import torch

from tosa_convert.tokens import Choice, gather_tokens, stand_ins


def borrow(run: Callable, tokens: torch.Tensor, normed: torch.Tensor, choice: Choice) -> torch.Tensor:
    """(B, N, D) → (B, N, D)."""
    attended = gather_tokens(tokens, choice.attended)
    return tokens + gather_tokens(run(attended) - attended, stand_ins(choice))
