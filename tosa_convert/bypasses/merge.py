"""Skipped tokens are averaged into their partner; the layer weighs each group by its size, as ToMe does
(arXiv 2210.09461, section 3.3); each token then adds the update of its group to itself.

The attention of a group is that of its tokens' mean behind the norm: a mean of tokens is shorter than they are, and a
norm would blow up what they have in common.
"""

from collections.abc import Callable

import torch

from tosa_convert.tokens import Choice, add_up, gather_tokens, stand_ins


def merge(run: Callable, tokens: torch.Tensor, normed: torch.Tensor, choice: Choice) -> torch.Tensor:
    """(B, N, D) → (B, N, D)."""
    sizes = add_up(tokens.new_ones(*tokens.shape[:2], 1), choice)
    means, normed_means = (add_up(each, choice) / sizes for each in (tokens, normed))
    return tokens + gather_tokens(run(means, sizes[..., 0], normed_means) - means, stand_ins(choice))
