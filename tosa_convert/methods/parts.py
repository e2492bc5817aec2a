"""What scores, bypasses and schedules have in common: typed options of their own, and being found by name.

The name of one of ours is that of its file. A user's own is named after its class, ``package.module:Class``, and
is known as soon as that class has been imported; nothing is imported because a file asks for it.
"""

import difflib
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict

from tosa_convert.base import discovery


class Options(BaseModel):
    """The options of one part, typed. Their names must differ from those of the parts it is combined with."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Part:
    """A score, a bypass or a schedule.

    Attributes:
        kind: "score", "bypass" or "schedule".
        folder: where ours of this kind are.
        Options: the options of this one; :attr:`options` holds their values.
        for_thresholds: those that mean something only with a threshold.
    """

    kind: ClassVar[str]
    folder: ClassVar[str]
    Options: ClassVar[type[Options]] = Options
    for_thresholds: ClassVar[tuple[str, ...]] = ()

    def __init__(self, **options: Any):
        super().__init__()
        self.options = self.Options(**options)

    @classmethod
    def name(cls) -> str:
        """What a configuration calls it."""
        package = f"tosa_convert.{cls.folder.replace('/', '.')}."
        if cls.__module__.startswith(package):
            return cls.__module__.removeprefix(package)
        return f"{cls.__module__}:{cls.__qualname__}"


P = TypeVar("P", bound=Part)


def find(kind: type[P], name: str) -> type[P]:
    """The part of a kind that is called so.

    Raises:
        ValueError: there is none; the nearest names are told.
    """
    ours = discovery.names(kind.folder)
    if name in ours:
        module = discovery.module(kind.folder, name)
        return next(part for part in vars(module).values() if _is_a(part, kind) and part.name() == name)
    for part in discovery.subclasses(kind):
        if part.name() == name:
            return part
    if ":" in name:
        raise ValueError(f"{name} is not one of ours; import {name.split(':')[0]} first, which defines it")
    raise ValueError(f"there is no {kind.kind} {name!r}; {near(name, ours) or 'choose from ' + ', '.join(ours)}")


def near(name: str, known: list[str]) -> str:
    """A hint at the known name that is most like a misspelt one, if any is."""
    found = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {found[0]!r}?" if found else ""


def every(kind: type[P]) -> dict[str, type[P]]:
    """Those of ours, by name."""
    return {name: find(kind, name) for name in discovery.names(kind.folder)}


def _is_a(part: Any, kind: type[Part]) -> bool:
    return isinstance(part, type) and issubclass(part, kind)
