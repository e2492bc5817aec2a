"""transformers: SAM's image encoder, also in SAM-HQ, GOT-OCR 2 and other OCR models, and ViTDet: their global blocks.

Alone, or inside a model with a mask decoder, which is served the whole map.
"""

import torch
from torch import nn

from tosa_convert.models.adapter import Adapter
from tosa_convert.models.families.transformers_vit import TransformersVit, layer_class, row_of
from tosa_convert.models.windowed import Windowed, over_the_image


def find(model: nn.Module) -> Adapter | None:
    row = row_of(model, understood)
    return None if row is None else TransformersSam(model, over_the_image(model, row))


def understood(layer: nn.Module) -> bool:
    """Whether it is built as SAM's or ViTDet's are, of which transformers has several copies."""
    attention = getattr(layer, "attn", None) or getattr(layer, "attention", None)
    parts = hasattr(attention, "qkv") and hasattr(attention, "proj")
    decomposed = any(hasattr(attention, name) for name in ("use_rel_pos", "use_relative_position_embeddings"))
    return parts and decomposed and isinstance(getattr(layer, "window_size", None), int)


class TransformersSam(Windowed, TransformersVit):
    bias_name = None

    def __init__(self, model: nn.Module, blocks: list[nn.Module]):
        self.channels_first = layer_class(blocks[0], ("VitDetLayer",)) is not None
        super().__init__(model, blocks)

    def _prefix_tokens(self, block):
        return 0

    @property
    def _vision_config(self):
        configs = (getattr(module, "config", None) for module in self.model.modules())
        return next(config for config in configs if hasattr(config, "patch_size") and hasattr(config, "image_size"))

    def project(self, attention, tokens, arguments):
        return self.split(attention, attention.qkv(tokens))

    def split(self, attention: nn.Module, projected: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, N, 3 · C) → queries, keys, values, (B, H, N, D)."""
        return tuple(projected.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4))

    def finish(self, attention, joined, tokens, weights=None):
        return self.as_attention_output(attention.proj(joined), weights)

    def attention_dropout(self, attention):
        return getattr(attention, "dropout", 0.0)

    def given_back(self, tokens):
        return (tokens,) if self.channels_first else tokens

    @property
    def forward(self):
        return getattr(self.model, "get_image_embeddings", self.model)

    def outputs(self, images):
        return {"feature_maps": self._maps(images)}

    def _maps(self, images: torch.Tensor) -> torch.Tensor:
        """(B, maps, C, rows, columns)."""
        found = self.forward(**self.inputs(images))
        if type(found) is tuple:  # SAM-HQ's, with the maps of its layers behind
            found = found[0]
        if isinstance(found, torch.Tensor):
            return found[:, None]
        maps = getattr(found, "feature_maps", None)
        return found.last_hidden_state[:, None] if maps is None else torch.stack(maps, dim=1)

    def tokens(self, images):
        return self._maps(images)[:, -1].flatten(2).mT
