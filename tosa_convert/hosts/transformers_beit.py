"""transformers: BEiT, alone and inside DPT.

Relative position biases, of each layer or shared by all.
"""

from torch import nn

from tosa_convert.hosts import Host
from tosa_convert.hosts.relative import OwnBias, RelativeHost
from tosa_convert.hosts.transformers_vit import TransformersVit, row_of_class

TRANSFORMERS = ("BeitLayer",)


def find(model: nn.Module) -> Host | None:
    row = row_of_class(model, TRANSFORMERS)
    return None if row is None else TransformersBeit(model, row)


class TransformersBeit(RelativeHost, TransformersVit):
    def _prefix_tokens(self, block: nn.Module) -> int:
        return 1

    def own_bias(self, block, kwargs):
        own = block.relative_position_bias
        if own is None:
            return None
        return OwnBias(own, "forward", own(self.grid(kwargs["resolution"])))

    def bias(self, attention, arguments):
        return arguments.get("attention_mask")  # the layer has put its own into it
