"""The control: tokens chosen without looking at them. What a score is worth is its lead over this."""

import torch

from tosa_convert.methods.score import Score, Site

PRIME = 65519
"""Not 1 modulo 3, so that every residue has one cube root."""


class RandomScore(Score):
    """A seeded pseudo-random order of the positions, another one for each layer and head.

    Every image gets the same order. It comes from integer arithmetic on the positions, so it is
    the same in torch and ONNX Runtime, and at every batch size.
    """

    scores_heads = True

    def setup(self, site: Site) -> None:
        self.seed, self.layer = site.seed % PRIME, site.layer  # of any size, and modulo this prime it ends as well

    def read(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """(B, H, N, D) twice → (B, H, N); only the shape of ``keys`` is looked at."""
        batch, heads, tokens, _ = keys.shape
        position = torch.arange(tokens, device=keys.device)[None, :]
        head = torch.arange(heads, device=keys.device)[:, None]
        value = position * 40503 + head * 30011 + self.layer * 10007 + self.seed * 7919 + 1
        for _ in range(3):  # cubing modulo this prime is one-to-one: no two positions of a head tie
            value = value % PRIME
            value = value * value % PRIME * value % PRIME * 48271 + 11
        value = value % PRIME
        return value.to(torch.float32).expand(batch, heads, tokens)
