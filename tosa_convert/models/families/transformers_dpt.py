"""transformers: DPT with a ViT of its own.

Its depth or segmentation head stays.
"""

import functools
from contextlib import contextmanager
from unittest import mock

from torch import nn

from tosa_convert.models.adapter import Adapter
from tosa_convert.models.branches import nothing
from tosa_convert.models.families.transformers_vit import TransformersVit, row_of_class
from tosa_convert.models.subclassing import answered

TRANSFORMERS = ("DPTViTLayer",)


def find(model: nn.Module) -> Adapter | None:
    row = row_of_class(model, TRANSFORMERS)
    return None if row is None else TransformersDpt(model, row)


class TransformersDpt(TransformersVit):
    bias_name = None  # its attention takes no mask
    square = True  # its neck takes the root of the number of tokens

    @property
    def gives_maps(self):
        """To its neck, where it has one."""
        return any(hasattr(module, "readout_projects") for module in self.model.modules())

    def _prefix_tokens(self, block: nn.Module) -> int:
        return 1

    def attention(self, block):
        return block.attention.attention  # the output projection is outside

    def branches(self, block):
        """The MLP's last module adds the tokens itself."""
        silent_output = lambda hidden, tokens: tokens  # noqa: E731
        return [(block.attention, nothing)], [(block.intermediate, nothing), (block.output, silent_output)]

    def projections(self, attention):
        return attention.query, attention.key, attention.value

    def finish(self, attention, joined, tokens, weights=None):
        return joined, weights

    def attention_dropout(self, attention) -> float:
        return attention.dropout_prob

    @property
    def patch_projection(self) -> nn.Module:
        embeddings = next(module for module in self.model.modules() if hasattr(module, "position_embeddings"))
        return getattr(embeddings, "patch_embeddings", embeddings).projection

    @contextmanager
    def exporting(self):
        """The neck, where it has one, is told the grid, since the root of a symbolic number would become a constant."""
        neck = next((module for module in self.model.modules() if hasattr(module, "readout_projects")), None)
        if neck is None:
            with super().exporting():
                yield
            return
        gather, grid = neck.forward, []
        handle = self.patch_projection.register_forward_hook(lambda _, __, output: grid.append(output.shape[-2:]))
        try:
            with super().exporting(), mock.patch.object(neck, "forward", lambda states, *_: gather(states, *grid[-1])):
                yield
        finally:
            handle.remove()

    def steered(self, block):
        return [(self.attention(block), "forward")]

    def call(self, block, forward, tokens, args, kwargs, places=None, sizes=None):
        if sizes is None:
            return forward(block, tokens, *args, **kwargs)
        attention = self.attention(block)
        with answered(attention, functools.partial(self.by_parts, attention, sizes)):
            return forward(block, tokens, *args, **kwargs)
