"""A small model that gives tokens, converted, as files with fewer bits are made of."""

import torch
from conftest import lively
from timm.models.vision_transformer import VisionTransformer

from tosa_convert import convert

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2, "num_classes": 0}
PLAN = {"score": "similarity", "bypass": "merge", "layers": {2: 0.6, 3: 0.6}, "segment": [2]}
FEW = {"min_cosine": 0.9, "images": 8}


def converted_backbone():
    """A converted model that gives tokens."""
    return convert(plain(), **PLAN)


def plain() -> VisionTransformer:
    torch.manual_seed(0)
    return lively(VisionTransformer(**TINY, global_pool=""))
