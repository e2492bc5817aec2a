"""The share of the original's multiply–adds that a conversion has: what a search asks dozens of times, and what differs
from image to image where each keeps as many tokens as it needs."""

import torch
from torch import nn

from tosa_convert.base.errors import UsageError
from tosa_convert.measure.macs import count_macs
from tosa_convert.measure.tally import tally
from tosa_convert.selective.selection import keeps_any_number


class MacsShare:
    """As fvcore counts, in a tenth of its time.

    fvcore traces a graph. Here the operators are counted as they run, which gives the same for nearly all that a
    conversion changes, but not for every head: operators whose result is not used, and resampling, count differently.
    So the original is counted by fvcore, and of its conversions only the difference from it is counted here. Where a
    layer looks ahead (bypass pool) norms run whose result is not used: for MCTF 0.003 of DeiT-Tiny's MACs.

    Args:
        model: the original.
    """

    def __init__(self, model: nn.Module):
        self.whole, self.base = count_macs(model), _count(model)

    def of(self, converted: nn.Module, images: torch.Tensor | None = None) -> float:
        """Of a conversion of the original; the mean over images, which it needs where it keeps as many tokens as an
        image needs."""
        if keeps_any_number(converted):
            if images is None:
                raise UsageError("the number of tokens differs from image to image; give images")
            each = self.of_each(converted, images)
            return sum(each) / len(each)
        return 1 + (_count(converted) - self.base) / self.whole

    def of_each(self, converted: nn.Module, images: torch.Tensor) -> list[float]:
        """Of a conversion, for each of the images (B, C, H, W)."""
        return [1 + (_count(converted, image[None]) - self.base) / self.whole for image in images]


def _count(model: nn.Module, image: torch.Tensor | None = None) -> int:
    return tally(model, image, [])[0]
