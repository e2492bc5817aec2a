"""ToSA's bypass (arXiv 2406.08816, section 3): a skipped token leaves the layer as it came."""

from collections.abc import Callable

import torch

from tosa_convert.tokens import Choice, gather_tokens, rejoin_tokens


def identity(run: Callable, tokens: torch.Tensor, normed: torch.Tensor | None, choice: Choice) -> torch.Tensor:
    """(B, N, D) → (B, N, D)."""
    return rejoin_tokens(tokens, choice.attended, run(gather_tokens(tokens, choice.attended)))
