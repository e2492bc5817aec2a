"""ToMe's bypass (arXiv 2210.09461, section 3): skipped tokens are merged into their partner for good."""

import torch

from tosa_convert.passage import Groups
from tosa_convert.tokens import Choice, add_up, pick, stand_ins


def persist(tokens: torch.Tensor, choice: Choice, groups: Groups, weights: torch.Tensor | None):
    """(B, N, D) → (B, K, D), averages weighted by how many tokens each one stands for already."""
    sizes = add_up(groups.sizes[..., None], choice)
    means = add_up(tokens * groups.sizes[..., None], choice) / sizes
    return means, Groups(sizes[..., 0], pick(stand_ins(choice), groups.places))
