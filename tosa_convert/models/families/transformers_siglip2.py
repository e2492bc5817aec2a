"""transformers: SigLIP 2 (NaFlex).

Images are cut into patches before the model sees them, and padded to one number if a processor does it.
"""

import math

import torch
from torch import nn

from tosa_convert.models.adapter import Adapter
from tosa_convert.models.families.transformers_vit import TransformersVit, layer_class, row_of
from tosa_convert.models.preprocessing import Preprocessing

TRANSFORMERS = ("Siglip2EncoderLayer",)


def find(model: nn.Module) -> Adapter | None:
    row = row_of(model, _sees_patches)
    return None if row is None else TransformersSiglip2(model, row)


def _sees_patches(layer: nn.Module) -> bool:
    """In the vision tower: the text tower is built from the same layers."""
    configs = [getattr(module, "config", None) for module in layer.children()]
    return layer_class(layer, TRANSFORMERS) is not None and any(hasattr(config, "num_patches") for config in configs)


class TransformersSiglip2(TransformersVit):
    """Input that a processor has padded comes with a mask of the valid patches."""

    def _prefix_tokens(self, block):
        return 0

    @property
    def patch_projection(self):
        """The embeddings, which are told the grid."""
        return next(module for module in self.model.modules() if hasattr(module, "resize_positional_embeddings"))

    def grid_of(self, inputs, output):
        if torch.compiler.is_compiling():  # a graph cannot ask for the shapes
            return (self._side, self._side) if output.shape[1] == self._side**2 else (output.shape[1],)
        shapes = inputs[1]
        rows, columns = shapes[0].tolist()
        whole = bool((shapes == shapes[:1]).all()) and rows * columns == output.shape[1]
        return (rows, columns) if whole else (output.shape[1],)  # of several grids, or one with padding: a row

    @property
    def _side(self) -> int:
        """Rows of the patches of the model's own size."""
        return math.isqrt(self._vision_config.num_patches)

    def preprocessing(self) -> Preprocessing:
        side = self._side * self._vision_config.patch_size
        return Preprocessing(size=(side, side), channels=self.channels, mean=(0.5,) * 3, std=(0.5,) * 3)

    def inputs(self, images):
        """Patches (B, N, P·P·C), as transformers' processor cuts them."""
        height, width = self.patch
        rows, columns = images.shape[-2] // height, images.shape[-1] // width
        patches = images.unflatten(-2, (rows, height)).unflatten(-1, (columns, width)).permute(0, 2, 4, 3, 5, 1)
        shapes = torch.tensor([[rows, columns]], device=images.device).expand(images.shape[0], 2)
        return {
            "pixel_values": patches.flatten(3).flatten(1, 2),
            "pixel_attention_mask": None,
            "spatial_shapes": shapes,
        }
