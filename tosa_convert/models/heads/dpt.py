"""DPT (arXiv 2103.13413), the form of it that Depth-Anything has (arXiv 2401.10891), by transformers' own modules."""

import torch
from torch import nn

from tosa_convert.base.errors import UsageError
from tosa_convert.models.dense import Head

NECK = (48, 96, 192, 384)
FUSED = 64


class Dpt(Head):
    def __init__(self, width, channels):
        super(Head, self).__init__()
        try:
            from transformers import DepthAnythingConfig
            from transformers.models.depth_anything.modeling_depth_anything import DepthAnythingNeck
        except ImportError:
            raise UsageError("head dpt needs transformers: pip install 'tosa-convert[hf]'") from None
        config = DepthAnythingConfig(
            reassemble_hidden_size=width, neck_hidden_sizes=list(NECK), fusion_hidden_size=FUSED
        )
        self.norm = nn.LayerNorm(width)
        self.neck = DepthAnythingNeck(config)
        self.last = nn.Sequential(
            nn.Conv2d(FUSED, FUSED // 2, 3, padding=1), nn.ReLU(), nn.Conv2d(FUSED // 2, channels, 1)
        )

    def forward(self, maps):
        rows, columns = maps[0].shape[-2:]
        tokens = [self.norm(each.flatten(2).mT) for each in maps]
        with_class_token = [torch.cat([each[:, :1], each], dim=1) for each in tokens]  # which the neck takes off
        return self.last(self.neck(with_class_token, rows, columns)[-1])
