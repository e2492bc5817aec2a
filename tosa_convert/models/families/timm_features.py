"""timm: features_only backbones.

A supported model whose feature maps are wanted, not its head.
"""

import torch
from timm.models._features import FeatureGetterNet
from torch import nn

from tosa_convert.models.adapter import Adapter, adapter_of
from tosa_convert.models.overlay import Overlay, laid_over


def find(model: nn.Module) -> Adapter | None:
    if not isinstance(model, FeatureGetterNet):
        return None
    return laid_over(_Features, adapter_of(model.model), getter=model)


class _Features(Overlay):
    """Over the adapter of the model inside."""

    getter: FeatureGetterNet
    classifies_by_class_token = False
    gives_maps = True

    @property
    def forward(self):
        return self.getter

    def outputs(self, images):
        return {"feature_maps": torch.stack(self.getter(images), dim=1)}  # all of one shape, on a plain ViT

    def tokens(self, images):
        kept = {"indices": [len(self.blocks) - 1], "output_fmt": "NLC", "return_prefix_tokens": True}
        patches, prefix = self.model.forward_intermediates(images, intermediates_only=True, **kept)[0]
        return torch.cat([prefix, patches], dim=1)

    def spec(self) -> dict:
        spec, getter = super().spec(), self.getter
        asked = {"features_only": True, "out_indices": list(getter.out_indices)}
        unwanted = ("num_classes", "global_pool")  # there is no head
        kept = {name: value for name, value in spec["model_args"].items() if name not in unwanted}
        return {**spec, "model_args": {**kept, **asked}}
