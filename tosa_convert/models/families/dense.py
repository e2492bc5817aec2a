"""timm, transformers: any of these under a new head.

See :mod:`tosa_convert.models.dense`.
"""

import functools

from torch import nn

from tosa_convert.models.adapter import Adapter
from tosa_convert.models.dense import DenseModel, whole_image


def find(model: nn.Module) -> Adapter | None:
    if not isinstance(model, DenseModel):
        return None
    adapter = _blank(type(model.adapter))
    vars(adapter).update(vars(model.adapter), whole=model)
    return adapter


def _blank(inside: type[Adapter]) -> Adapter:
    kind = _over(inside)
    return kind.__new__(kind)


@functools.cache
def _over(inside: type[Adapter]) -> type[Adapter]:
    return type(f"Dense{inside.__name__}", (_Dense, inside), {"inside": inside})


class _Dense:
    """Over the adapter of the backbone."""

    whole: DenseModel
    inside: type[Adapter]
    classifies_by_class_token = False
    gives_maps = True
    embeds = False

    def __reduce__(self):
        """Its class is made here, so it cannot be found by its name."""
        return _blank, (self.inside,), vars(self)

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
