"""Small models with thresholds at the middle of what their scores give."""

import torch
from conftest import LAYERS, lively
from families import FAMILIES
from torch import nn

from tosa_convert import convert
from tosa_convert.models.adapter import run
from tosa_convert.selective.selection import selective_blocks


def at_the_middle(model: nn.Module, images: torch.Tensor, **parts) -> nn.Module:
    """Converted, with thresholds between the values that these images have in each layer."""
    converted = convert(model, **{"layers": LAYERS, "score": "similarity", "threshold": 0.0, **parts})
    for block in selective_blocks(converted):
        block.selection.threshold_for = _Middle(block.selection)
    with torch.no_grad():
        run(converted, images)
    for block in selective_blocks(converted):
        del block.selection.threshold_for
    return converted


class _Middle:
    def __init__(self, selection):
        self.selection = selection

    def __call__(self, worth):
        values = worth[:, self.selection.prefix :].flatten()
        values = values[values.isfinite()].sort().values
        middle = values[len(values) // 3 : 2 * len(values) // 3]
        widest = middle.diff().argmax()  # where rounding turns no choice
        self.selection.threshold = (middle[widest] + middle[widest + 1]).item() / 2
        return self.selection.threshold


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return lively(FAMILIES[name]())
