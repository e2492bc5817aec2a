"""transformers: BEiT, alone and inside DPT.

Relative position biases, of each layer or shared by all.
"""

from torch import nn

from tosa_convert.models.adapter import Adapter
from tosa_convert.models.families.transformers_vit import TransformersVit, row_of_class
from tosa_convert.models.relative_bias import OwnBias, RelativeAdapter

TRANSFORMERS = ("BeitLayer",)


def find(model: nn.Module) -> Adapter | None:
    row = row_of_class(model, TRANSFORMERS)
    return None if row is None else TransformersBeit(model, row)


class TransformersBeit(RelativeAdapter, TransformersVit):
    def _prefix_tokens(self, block: nn.Module) -> int:
        return 1

    def own_bias(self, block):
        own = block.relative_position_bias
        return None if own is None else OwnBias(own, "forward")

    def bias_arguments(self, kwargs):
        return (self.grid(kwargs["resolution"]),)

    def bias(self, attention, arguments):
        return arguments.get("attention_mask")  # the layer has put its own into it
