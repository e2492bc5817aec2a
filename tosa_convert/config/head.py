"""A head on a backbone, as a recipe or a run notes it."""

from pydantic import BaseModel, ConfigDict, Field


class HeadConfig(BaseModel):
    """What :func:`tosa_convert.models.dense.with_head` builds.

    Attributes:
        task: what its map is, the name of a file of :mod:`tosa_convert.tasks`; the model's output is called so.
        head: the name of a file of :mod:`tosa_convert.models.heads`.
        channels: of the map: 1, or the classes that every pixel is one of.
        max_depth: metres; where given the map is the head's sigmoid times this, otherwise its logits.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    task: str
    head: str = "light"
    channels: int = Field(default=1, ge=1)
    max_depth: float | None = Field(default=None, gt=0)
