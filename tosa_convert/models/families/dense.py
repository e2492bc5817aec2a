"""timm, transformers: any of these under a new head.

See :mod:`tosa_convert.models.dense`.
"""

from torch import nn

from tosa_convert.models.adapter import Adapter
from tosa_convert.models.dense import DenseModel, whole_image
from tosa_convert.models.overlay import Overlay, laid_over


def find(model: nn.Module) -> Adapter | None:
    if not isinstance(model, DenseModel):
        return None
    return laid_over(_Dense, model.adapter, whole=model)


class _Dense(Overlay):
    """Over the adapter of the backbone."""

    whole: DenseModel
    classifies_by_class_token = False
    gives_maps = True
    embeds = False

    @property
    def forward(self):
        return self.whole

    def inputs(self, images):
        return {"images": images}

    def outputs(self, images):
        return {self.whole.config.task: self.whole(images)}

    def preprocessing(self):
        return whole_image(super().preprocessing())

    def spec(self) -> dict:
        return {**super().spec(), "head": self.whole.config.model_dump()}
