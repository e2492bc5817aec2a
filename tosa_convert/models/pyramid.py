"""Maps of one scale → a pyramid of four: at 4, 2, 1 and 1/2 times the resolution of the patches.

With patches of 16 pixels these are the strides 4, 8, 16 and 32 that heads made for hierarchical backbones expect. Such
a neck is how plain ViTs are put under them since ViTDet (arXiv 2203.16527, section 3) and BEiT (arXiv 2106.08254,
section 3.3); deeper layers serve the coarser scales.
"""

import torch
from torch import nn


class Pyramid(nn.Module):
    """Each level's tokens are normed, then brought to its scale.

    Args:
        width: channels of a token; the levels keep it.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.scales = nn.ModuleList(
            [
                nn.Sequential(_twice(width), nn.GELU(), _twice(width)),
                _twice(width),
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        )

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Four of (B, C, rows, columns), the shallowest first → as many, the finest first; of an odd number of rows or
        columns the coarsest has the larger half."""
        normed = [
            norm(each.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for norm, each in zip(self.norms, maps, strict=True)
        ]
        return [scale(each) for scale, each in zip(self.scales, normed, strict=True)]


def _twice(width: int) -> nn.Module:
    return nn.ConvTranspose2d(width, width, 2, stride=2)
