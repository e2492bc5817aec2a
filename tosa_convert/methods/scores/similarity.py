"""Skip the most redundant tokens: those that another one can stand in for."""

import math
from typing import Any, Literal

import torch
from pydantic import Field

from tosa_convert.base.errors import TosaError
from tosa_convert.methods import parts
from tosa_convert.methods.matching import (
    apart,
    choose_bipartite,
    choose_redundant,
    features_of,
    losses_if_skipped,
    pyramid,
    thinnings,
)
from tosa_convert.methods.score import Acts, Reads, Score, Site, View, Worth
from tosa_convert.methods.token_ops import Choice, keep_count

LEVELS = 5
"""How often the patches are thinned out where any number may attend: one in 32 always does."""


class Similarity(Score):
    """Around a block: distances between the layer's tokens over the levels of a pyramid of the grid.

    Where tokens are gone already there is no grid; there it is ToMe's bipartite soft matching (arXiv 2210.09461) of
    the layer's own keys.
    """

    class Options(parts.Options):
        """
        Attributes:
            compare_by: what the distances are of, see :func:`~tosa_convert.methods.matching.features_of`. Which one is
                better differs from model to model; a plan tries both.
            relative: where a threshold says how many tokens attend: to which power an image's mean distance divides
                its distances. 0 compares images by their distances, 1 only by how these are distributed.
        """

        compare_by: Literal["normed", "tokens"] = "normed"
        relative: float = Field(default=0.0, ge=0, le=1)

    variants = ({"compare_by": "tokens"},)
    for_thresholds = ("relative",)
    any_number_variants = ({"relative": 0.5},)
    reads = Reads.TOKENS
    chooses = finds_partners = half_at_most = True

    @classmethod
    def reads_at(cls, acts):
        return Reads.TOKENS if acts is Acts.AROUND else Reads.QUERIES_KEYS

    def setup(self, site: Site) -> None:
        self.prefix = site.prefix

    def read(self, queries: torch.Tensor, keys: torch.Tensor) -> Any:
        """(B, H, N, D) twice → (B, N, D), the mean of the keys over the heads."""
        return keys.mean(1)

    def score(self, view: View) -> Choice:
        kept = keep_count(view.patches, view.steps)
        if view.reading is not None:
            return choose_bipartite(view.reading, self.prefix, kept)
        features = self._features(view)
        most = kept if isinstance(kept, int) else None
        grid = pyramid(view.grid, thinnings(view.steps), most, features.device)
        return choose_redundant(features, self.prefix, grid, kept, view.partners)

    def worth(self, view: View) -> Worth:
        """The squared distance to the nearest token on a coarser level."""
        features = self._features(view)
        grid = pyramid(view.grid, LEVELS, None, features.device)
        losses = losses_if_skipped(features, self.prefix, grid)
        if self.options.relative:
            compared = losses.isfinite() if view.padding is None else losses.isfinite() & ~view.padding
            mean = losses.masked_fill(~compared, 0).sum(1, keepdim=True) / compared.sum(1, keepdim=True)
            losses = losses / mean.clamp(min=1e-6) ** self.options.relative
        return Worth(losses, features)

    def _features(self, view: View) -> torch.Tensor:
        count = view.tokens.shape[1] - self.prefix
        filled = math.prod(view.grid)
        if isinstance(filled, int) and isinstance(count, int) and filled != count:
            raise TosaError(
                f"{count} patch tokens do not fill the grid of {filled}: score similarity needs all of them, so "
                "no patch dropout, and the patch embedding that the model had when it was converted"
            )
        return apart(features_of(view.tokens, view.normed, self.options.compare_by), view.padding)
