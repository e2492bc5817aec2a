"""The bypass of frequency-aware token reduction (arXiv 2511.21477, section 3.3, Eq. 10 and 11): skipped tokens become
one "DC token" for each window of the image, their mean."""

import math

import torch
from pydantic import Field

from tosa_convert.methods import parts
from tosa_convert.methods.bypass import Bypass
from tosa_convert.methods.score import Acts
from tosa_convert.methods.token_ops import gather_tokens, pick, stand_ins


class LocalMean(Bypass):
    """DC tokens come last. They attend in the layers after and are no candidates there: the next layer that takes
    tokens away makes one DC token of them and of those that it skips, weighed by how many tokens each one stands for.

    Left open by the paper and chosen here: that weighing; the token of a window in which nothing is skipped, which
    repeats that of the best skipped token; and where positions matter, a DC token stands where the best of its tokens
    stood.
    """

    class Options(parts.Options):
        """
        Attributes:
            windows: of a row and of a column of the image, in the first layer that takes tokens away; later ones
                have one. At most 8.
        """

        windows: int = Field(default=2, ge=1, le=8)

    acts = Acts.BETWEEN
    ranks = True

    def reduce(self, tokens, choice, groups, weights):
        if choice.skipped.shape[1] == 0:  # a mean of no tokens would be a token of its own
            return tokens, groups
        windows, window = (1, torch.zeros_like(groups.at)) if groups.apart else self._windows(groups)
        each = torch.arange(windows, device=window.device)[:, None]
        of = pick(window, choice.skipped)[:, None]
        inside, counts = of == each, pick(groups.sizes, choice.skipped)[:, None]  # (B, windows, S) and (B, 1, S)
        sizes = (inside * counts).sum(2)
        inside = inside | ~inside.any(2, keepdim=True) & (of == of[..., :1])
        shares = inside * counts
        means = shares / shares.sum(2, keepdim=True) @ gather_tokens(tokens, choice.skipped)
        together = torch.cat([gather_tokens(tokens, choice.attended), means], dim=1)
        into = stand_ins(choice._replace(partners=of[:, 0] + choice.attended.shape[1]))
        best = pick(choice.skipped, inside.int().argmax(2))  # the skipped ones are in the order of their scores
        at = pick(groups.at, torch.cat([choice.attended, best], dim=1))
        sizes = torch.cat([pick(groups.sizes, choice.attended), sizes], dim=1)
        return together, groups._replace(sizes=sizes, places=pick(into, groups.places), at=at, apart=windows)

    def _windows(self, groups):
        """How many windows there are, and in which each token is, (B, n); prefix tokens in any."""
        prefix = groups.places.shape[1] - math.prod(groups.grid)
        place, window, windows = groups.at - prefix, 0, 1
        for length in reversed(groups.grid):
            window = window + place % length * self.options.windows // length * windows
            place, windows = place // length, windows * self.options.windows
        return windows, window
