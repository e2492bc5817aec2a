"""Small ViTs with gates, and images for them."""

import torch
from conftest import lively
from families import SMALL
from timm.models.vision_transformer import VisionTransformer

from tosa_convert import convert
from tosa_convert.selective.selection import choosing_blocks


def photos(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def vit(**options) -> VisionTransformer:
    torch.manual_seed(0)
    return lively(VisionTransformer(**{**SMALL, **options}))


def gated(**options):
    """With gates that differ from token to token and image to image."""
    model = convert(vit(), **{"method": "spa", **options})
    generator = torch.Generator().manual_seed(5)
    for block in choosing_blocks(model):
        block.selector.linear.weight.data = torch.randn(block.selector.linear.weight.shape, generator=generator) / 4
        block.selector.linear.bias.data.fill_(0.3)
    return model
