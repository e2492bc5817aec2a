"""transformers: ViT-MAE encoder, its masking turned off."""

import torch
from torch import nn

from tosa_convert.errors import UnsupportedModelError
from tosa_convert.hosts import Host
from tosa_convert.hosts.transformers_vit import TransformersVit, layer_class, row_of

TRANSFORMERS = ("ViTMAELayer",)


def adapt(config) -> str | None:
    """Make a loaded configuration one of a model that can be converted; the class to load, if it is not its own."""
    if config.model_type != "vit_mae":
        return None
    config.mask_ratio = 0.0
    return "ViTMAEModel"


def find(model: nn.Module) -> Host | None:
    row = row_of(model, lambda layer: layer_class(layer, TRANSFORMERS) is not None)
    if row is None:
        return None
    if model.config.mask_ratio:
        raise UnsupportedModelError(
            f"{type(model).__name__} hides {model.config.mask_ratio:.0%} of its patches at random, for pre-training; "
            "set model.config.mask_ratio = 0 to convert it as an encoder"
        )
    return TransformersMae(model, row)


class TransformersMae(TransformersVit):
    """Without masking the encoder still shuffles its tokens, unless it is given noise that is sorted already."""

    def _prefix_tokens(self, block: nn.Module) -> int:
        return 1

    def inputs(self, images):
        patches = self.patches(tuple(images.shape[-2:]))
        in_order = torch.arange(patches, device=images.device, dtype=images.dtype)
        return {**super().inputs(images), "noise": in_order.expand(images.shape[0], patches)}
