"""Published methods: rows of the table score × bypass × schedule. One file each in
:mod:`tosa_convert.methods.published`."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from tosa_convert.base import discovery


class Method(NamedTuple):
    """What a published method consists of.

    Attributes:
        score, bypass, schedule: its parts, by name.
        losses: what fine-tuning minimises besides, name → weight.
        control: whether it is what methods are compared with, not one of them.
        score_before: what its score was in 0.2.0; runs of then have that, and whoever asks for it.
    """

    score: str
    bypass: str
    schedule: str
    losses: Mapping[str, float] = MappingProxyType({})
    control: bool = False
    score_before: str | None = None

    def admits(self, kind: str, part: str) -> bool:
        """Whether a part is one of its own, or was."""
        return part == self.parts[kind] or (kind == "score" and part == self.score_before)

    @property
    def parts(self) -> dict[str, str]:
        return {"score": self.score, "bypass": self.bypass, "schedule": self.schedule}


FOLDER = "methods/published"


def published() -> dict[str, Method]:
    """All of them, by name."""
    return {name: discovery.module(FOLDER, name).METHOD for name in discovery.names(FOLDER)}


def control() -> str:
    """The name of the one that the others are compared with."""
    return next(name for name, method in published().items() if method.control)
