"""Thresholds moved to a mean: images take a share of the original's multiply–adds on average."""

import copy
import math
import warnings

import numpy as np
import torch
from torch import nn

from tosa_convert.base.errors import TosaWarning, UsageError
from tosa_convert.base.progress import Progress
from tosa_convert.measure.macs_share import MacsShare
from tosa_convert.measure.similarity import observe
from tosa_convert.models.modes import evaluating
from tosa_convert.selective.conversion import original, with_threshold
from tosa_convert.selective.selection import choosing_blocks, keeps_any_number, selective_blocks

FEWEST = 4
"""Images for a plan whose numbers of tokens are to differ between images."""
SHIFTS = 15
"""How often thresholds are moved to meet a mean."""
AT_ONCE = 64
"""Images that run at once where only scores are read."""
NEAR = 0.002
"""Share of the MACs by which a plan may stay below its budget."""
FAR = 0.02
"""Share of the MACs below the budget from which that is said."""


def check_differing(images: torch.Tensor) -> None:
    """
    Raises:
        UsageError: too few images to learn from how they differ.
    """
    if len(images) < FEWEST:
        raise UsageError(
            f"from {len(images)} image{'s' if len(images) != 1 else ''} it cannot be seen how images differ; take "
            f"{FEWEST} or more, better 24, of the kind that the model will see (plan takes as many as --images says)"
        )


def check_reachable(model: nn.Module, images: torch.Tensor, budget: float) -> None:
    """Whatever its gates or its filter are to learn.

    Raises:
        UsageError: a conversion with thresholds takes more than a share of the original's multiply–adds even where no
            token reaches them, or less even where all do, since a ratio bounds how many may attend.
    """
    _ends(model, images, budget, MacsShare(original(model)))


def _ends(model: nn.Module, images: torch.Tensor, budget: float, share_of: MacsShare) -> tuple[float, float]:
    """The share of the multiply–adds where no token reaches the thresholds, and where all do."""
    least, most = (with_all_at(each, model, images, share_of) for each in (math.inf, -math.inf))
    if least > budget:
        raise UsageError(
            f"even with the fewest tokens images take {least:.3f} of the MACs, above {budget:g}; give a higher share"
        )
    if most < budget:
        raise UsageError(
            f"with the ratios that bound their tokens images take {most:.3f} of the MACs at most, below {budget:g}; "
            "give a lower share, or convert with a higher --ratio"
        )
    return least, most


def with_all_at(threshold: float, model: nn.Module, images: torch.Tensor, share_of: MacsShare) -> float:
    """The share where all layers that choose have a threshold that all tokens reach, or none: that of all images."""
    return share_of.of(with_threshold(model, threshold), images[:1])


def at_mean(model: nn.Module, images: torch.Tensor, budget: float, progress: Progress | None = None) -> nn.Module:
    """A copy of a conversion with thresholds, all of them moved by one number so that the mean multiply–adds over
    images (B, C, H, W) are at most a share of the original's, and close to it.

    Raises:
        UsageError: the conversion has no thresholds, there are too few images, or the budget cannot be reached by
            moving the thresholds.
    """
    if not keeps_any_number(model):
        raise UsageError("at_mean is for thresholds: convert the model with one, such as by method spa")
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or not len(images) or not 0 < budget < 1:
        raise UsageError("at_mean takes images (B, C, H, W) and a share of the MACs between 0 and 1")
    check_differing(images)
    images = images.to(next(model.parameters()).device)
    share_of, moved = MacsShare(original(model)), copy.deepcopy(model)
    least, most = _ends(moved, images, budget, share_of)
    shares, blocks = _Shares(share_of, moved, images), choosing_blocks(moved)
    levels = shares.levels()
    before = [block.selection.threshold for block in blocks]

    def move(place: float) -> None:
        """All thresholds, to a place among the levels: 0 where all tokens are above them, 1 where none is."""
        by = float(np.quantile(levels, place))
        for block, threshold in zip(blocks, before, strict=True):
            block.selection.threshold = threshold + by

    low, high = (0.0, most), (1.0, least)  # a place, and the share of the MACs there
    with (progress or Progress()).track("thresholds", SHIFTS) as advance:
        for shift in range(SHIFTS):
            # The share falls nearly evenly along the places; halving now and then is for where it does not.
            part = 0.5 if shift % 3 == 2 else (low[1] - budget + NEAR / 2) / max(low[1] - high[1], NEAR)
            place = low[0] + min(max(part, 0.02), 0.98) * (high[0] - low[0])
            move(place)
            share = shares.mean()
            advance(f"{share:.3f} of the MACs")
            if share > budget:
                low = place, share
                continue
            high = place, share
            if share > budget - NEAR:
                break
    if high[1] < budget - FAR:
        warnings.warn(
            f"moving the thresholds goes in steps here: the mean is {high[1]:.3f} of the MACs, not {budget:g}",
            TosaWarning,
            stacklevel=2,
        )
    move(high[0])
    reached = {block.selection.layer: block.selection.threshold for block in choosing_blocks(moved)}
    layers = [block.selection.layer for block in selective_blocks(moved)]
    moved.tosa_config = moved.tosa_config.model_copy(update={"threshold": for_each(layers, reached)})
    return moved


class _Shares:
    """What images take with the thresholds that a model has, as a share of the original's multiply–adds.

    Where all layers go by one choice, that is a function of how many tokens it keeps: of images with the same number
    one is run.

    Args:
        images: (B, C, H, W).
    """

    def __init__(self, share_of: MacsShare, model: nn.Module, images: torch.Tensor):
        self.share_of, self.model, self.images = share_of, model, images
        self.blocks = choosing_blocks(model)
        found = [self._scores(part) for part in images.split(AT_ONCE)]
        self.scores = [torch.cat(each) for each in zip(*found, strict=True)]
        self.known: dict[int, float] = {}

    def _scores(self, images: torch.Tensor) -> list[torch.Tensor]:
        """(B, P) of each choosing layer."""
        with evaluating(self.model):  # a gate in training draws noise
            observe(self.model, images)
        scores = self.blocks[0].selection.current.state.scores
        return [scores[each.selection.layer][:, each.selection.prefix :] for each in self.blocks]

    def levels(self) -> np.ndarray:
        """By how much thresholds would have to be raised to reach each token of each choosing layer; and, below and
        above all of them, a number that surely reaches all, and none."""
        pairs = zip(self.scores, self.blocks, strict=True)
        above = torch.cat([(scores - block.selection.threshold).flatten() for scores, block in pairs])
        found = above[above.isfinite()].double().cpu().numpy()
        far = 2 * np.abs(found).max() + 1.0
        return np.array([-far, *found, far])

    def mean(self) -> float:
        if len(self.blocks) > 1:
            return self.share_of.of(self.model, self.images)
        kept = (self.scores[0] >= self.blocks[0].selection.threshold).sum(1).clamp(min=1).tolist()
        for image, count in zip(self.images, kept, strict=True):
            if count not in self.known:
                self.known[count] = self.share_of.of(self.model, image[None])
        return sum(self.known[count] for count in kept) / len(kept)


def for_each(layers: list[int], found: dict[int, float]) -> list[float]:
    """The threshold of each layer; one that goes on with the choice of the layer before has that of this one."""
    each, last = [], 0.0
    for layer in layers:
        last = found.get(layer, last)
        each.append(last)
    return each
