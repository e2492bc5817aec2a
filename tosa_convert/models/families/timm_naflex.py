"""timm: NaFlexViT.

Its blocks are those of ViT or of Eva.
"""

from timm.models.naflexvit import NaFlexVit
from torch import nn

from tosa_convert.models.adapter import Adapter
from tosa_convert.models.families.timm_eva import TimmEva
from tosa_convert.models.families.timm_eva import understood as of_eva
from tosa_convert.models.families.timm_vit import TimmVit, all_of
from tosa_convert.models.families.timm_vit import understood as of_vit

TIMM = ("naflexvit",)


def find(model: nn.Module) -> Adapter | None:
    if not isinstance(model, NaFlexVit):
        return None
    kinds = ((NaFlexOfVit, of_vit), (NaFlexOfEva, of_eva))
    return next((adapter(model) for adapter, understood in kinds if all_of(model.blocks, understood)), None)


class _NaFlex:
    """What is not as in other timm models. Pre-patchified input brings a mask of the valid patches."""

    def __init__(self, model: NaFlexVit):
        super().__init__(model)
        self.class_token = model.has_class_token

    @property
    def patch_projection(self) -> nn.Module:
        return self.model.embeds

    def grid_of(self, inputs, output):
        """Of pre-patchified input, with a grid of its own for each image: a row."""
        tokens, grid = output
        return grid or (tokens.shape[1] - self.prefix,)

    @property
    def size(self):
        return None  # any

    @property
    def channels(self) -> int:
        return self.model.in_chans

    @property
    def patch(self) -> tuple[int, int]:
        return tuple(self.model.embeds.patch_size)

    def resize(self, size: tuple[int, int]) -> None:
        """Nothing to do: position embeddings are resampled in each forward."""


class NaFlexOfVit(_NaFlex, TimmVit):
    pass


class NaFlexOfEva(_NaFlex, TimmEva):
    pass
