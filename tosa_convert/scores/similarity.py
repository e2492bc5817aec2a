"""Skip the most redundant tokens: those that another one can stand in for."""

import torch
from torch import nn

from tosa_convert.errors import TosaError
from tosa_convert.matching import choose_bipartite, choose_redundant, pyramid, thinnings
from tosa_convert.passage import Passage
from tosa_convert.tokens import Choice, keep_count


class GridSimilarity(nn.Module):
    """On the grid of all patches: distances between the layer's tokens over the levels of a pyramid.

    Args:
        prefix: number of leading tokens that are no patches.
        passage: knows the grid.
    """

    listens, chooses = False, True

    def __init__(self, prefix: int, passage: Passage):
        super().__init__()
        self.prefix, self.passage = prefix, passage

    def forward(self, features: torch.Tensor, steps: int) -> Choice:
        """(B, N, D) and the keep ratio, see :func:`~tosa_convert.tokens.ratio_steps` → the choice, with partners."""
        patches, count = self.passage.patches, features.shape[1] - self.prefix
        if isinstance(patches, int) and isinstance(count, int) and patches != count:
            raise TosaError(
                f"{count} patch tokens do not fill the grid of {patches}: score similarity needs all of them, so no "
                "patch dropout, and the patch embedding that the model had when it was converted"
            )
        kept = keep_count(patches, steps)
        grid = pyramid(*self.passage.grid, thinnings(steps), kept if isinstance(kept, int) else None, features.device)
        return choose_redundant(features, self.prefix, grid, kept)


class HeadMean(nn.Module):
    """The mean of the keys over the heads."""

    def forward(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """(B, H, N, D) twice → (B, N, D)."""
        return keys.mean(1)


class KeySimilarity(nn.Module):
    """Where tokens are gone already and there is no grid: ToMe's bipartite soft matching (arXiv 2210.09461)
    of the layer's own keys."""

    listens, chooses = True, True

    def __init__(self, prefix: int, passage: Passage):
        super().__init__()
        self.prefix, self.passage = prefix, passage
        self.read = HeadMean()

    def forward(self, keys: torch.Tensor, steps: int) -> Choice:
        """(B, N, D) and the keep ratio, of the image's patches, gone ones included → the choice, with partners."""
        return choose_bipartite(keys, self.prefix, keep_count(self.passage.patches, steps))
