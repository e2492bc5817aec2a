"""transformers: BEiT, alone and inside DPT.

Relative position biases, of each layer or shared by all.
"""

from functools import wraps

import torch
from torch import nn

from tosa_convert.models.adapter import Adapter
from tosa_convert.models.families.transformers_vit import TransformersVit, row_of_class
from tosa_convert.models.relative_bias import OwnBias, RelativeAdapter

TRANSFORMERS = ("BeitLayer",)
INDEX = "generate_relative_position_index"


def _keep_trainable(kind: type[nn.Module]) -> None:
    """transformers keeps the index of its biases for all models of the process. Where it was first made in inference
    mode, none of them could be trained afterwards."""
    made = getattr(kind, INDEX)
    if hasattr(made, "trainable"):
        return

    @wraps(made)
    def trainable(window_size: tuple[int, int]) -> torch.Tensor:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return made(window_size)
        with torch.inference_mode(False):
            return made(window_size)

    trainable.trainable = True
    setattr(kind, INDEX, staticmethod(trainable))


def find(model: nn.Module) -> Adapter | None:
    row = row_of_class(model, TRANSFORMERS)
    return None if row is None else TransformersBeit(model, row)


class TransformersBeit(RelativeAdapter, TransformersVit):
    def __init__(self, model: nn.Module, blocks: list[nn.Module]):
        super().__init__(model, blocks)
        for module in model.modules():
            if hasattr(type(module), INDEX):
                _keep_trainable(type(module))

    def _prefix_tokens(self, block: nn.Module) -> int:
        return 1

    def own_bias(self, block):
        own = block.relative_position_bias
        return None if own is None else OwnBias(own, "forward")

    def bias_arguments(self, kwargs):
        return (self.grid(kwargs["resolution"]),)

    def bias(self, attention, arguments):
        return arguments.get("attention_mask")  # the layer has put its own into it
