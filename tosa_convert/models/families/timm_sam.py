"""timm: the image encoder of SAM, its blocks with global attention."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn

from tosa_convert.base.errors import UnsupportedModelError
from tosa_convert.models.adapter import Adapter
from tosa_convert.models.families.timm_vit import TimmVit, split_qkv
from tosa_convert.models.unsupported import not_understood
from tosa_convert.models.windowed import Windowed, over_the_image

TIMM = ("vision_transformer_sam",)


def find(model: nn.Module) -> Adapter | None:
    return TimmSam(model) if isinstance(model, VisionTransformerSAM) else None


class TimmSam(Windowed, TimmVit):
    bias_name = None

    def __init__(self, model: VisionTransformerSAM):
        Adapter.__init__(self, model)
        self.blocks = over_the_image(model, list(model.blocks))
        if self.blocks[0].attn.rope is not None:
            index = list(model.blocks).index(self.blocks[0])
            raise UnsupportedModelError(not_understood(f"blocks.{index}", self.blocks[0]))
        self.prefix, self.class_token, self.width = 0, False, model.embed_dim

    def split(self, attention, projected):
        return split_qkv(attention, projected)

    def finish(self, attention, joined, tokens, weights=None):
        return attention.proj_drop(attention.proj(joined))

    @property
    def classifies_by_class_token(self) -> bool:
        return False

    def outputs(self, images):
        maps = self.model.forward_features(images)
        if self.model.num_classes > 0:
            return {"logits": self.model.forward_head(maps)}
        return {"tokens": maps.flatten(2).mT, "features": self.model.forward_head(maps)}

    def tokens(self, images):
        return self.model.forward_features(images).flatten(2).mT

    def resize(self, size):
        """Nothing to do: position embeddings are resampled in each forward."""

    @contextmanager
    def exporting(self) -> Iterator[None]:
        """torch.onnx has no fused attention of three dimensions, which timm calls here."""
        with ExitStack() as stack:
            for block in self.model.blocks:
                stack.enter_context(mock.patch.object(block.attn, "fused_attn", False))
            yield
