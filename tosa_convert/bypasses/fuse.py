"""EViT's bypass (arXiv 2202.07800, section 3.2): the skipped tokens become one, summed by their weights."""

import torch

from tosa_convert.passage import Groups
from tosa_convert.tokens import Choice, gather_tokens, pick, stand_ins


def fuse(tokens: torch.Tensor, choice: Choice, groups: Groups, weights: torch.Tensor | None):
    """(B, N, D) → (B, K + 1, D), the fused token last. ``weights``, (B, N): the class token's attention."""
    if choice.skipped.shape[1] == 0:  # a sum of nobody would be a token of its own
        return tokens, groups
    shares = pick(weights, choice.skipped)[..., None]
    fused = (gather_tokens(tokens, choice.skipped) * shares).sum(1, keepdim=True)
    last = torch.full_like(choice.skipped, choice.attended.shape[1])
    into = stand_ins(choice._replace(partners=last))
    together = torch.cat([gather_tokens(tokens, choice.attended), fused], dim=1)
    return together, Groups(torch.ones_like(together[..., 0]), pick(into, groups.places))
