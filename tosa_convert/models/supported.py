"""Which models can be converted, and why the others cannot: asked of the adapters, not kept in a list."""

from collections.abc import Callable
from fnmatch import fnmatch
from types import ModuleType
from typing import Any

import timm
import torch
from torch import nn

from tosa_convert.base.errors import UnsupportedModelError, UsageError, gist
from tosa_convert.base.progress import Progress
from tosa_convert.models import adapter as adapters
from tosa_convert.models import unsupported as refusals
from tosa_convert.models.adapter import Adapter, adapter_of
from tosa_convert.models.relative_bias import RelativeAdapter
from tosa_convert.models.windowed import Windowed

LARGEST = 1.5e9
"""Weights of a model that is built to be looked at."""


def families() -> list[dict[str, str]]:
    """What this version knows of each family that it can convert."""
    count = {module: len(timm.list_models(module=module)) for module in timm.list_modules()}
    rows = []
    for family in sorted(adapters.families(), key=lambda family: family.__name__):
        names = [*getattr(family, "TIMM", ()), *getattr(family, "TRANSFORMERS", ())]
        known = sum(count.get(name, 0) for name in names)
        rows.append(
            {
                "family": _summary(family),
                "names": str(known or ""),
                "positions": _of_all(family, _positions),
                "per head": _of_all(family, lambda adapter: "yes" if adapter.own_heads else "no"),
                "tome": _of_all(family, _takes_away),
            }
        )
    proven = {"family": "transformers: any other ViT, by proof (`models CLASS` or `models FOLDER` runs it)"}
    return [*rows, {**proven, "names": "", "positions": "added or rotary", "per head": "yes", "tome": "mostly"}]


def family_of(model: nn.Module) -> str:
    """What the family calls itself that finds a model; empty if none does."""
    found = next((family for family in adapters.families() if family.find(model) is not None), None)
    return "" if found is None else _summary(found)


def is_class(name: str) -> bool:
    """Whether a name is that of a model class of transformers."""
    return _class(name) is not None


def default_of_class(name: str) -> nn.Module | None:
    """A model of a class of transformers by its default config, with random weights; None if there is no such class.

    Raises:
        UsageError: it is too large.
    """
    kind: Any = _class(name)
    if kind is None:
        return None
    config = kind.config_class()
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in kind(config).parameters())
    if weights > LARGEST:
        raise UsageError(
            f"{name} has {weights / 1e9:.1f} billion weights by its default config, too many to try; give the class of "
            "its vision part, or the folder of a model"
        )
    return kind(config).eval()


def _class(name: str) -> type | None:
    if not name.isidentifier() or not name[0].isupper():  # transformers takes seconds to import
        return None
    try:
        import transformers
    except ImportError:
        return None
    kind = getattr(transformers, name, None)
    model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    return kind if model and getattr(kind, "config_class", None) else None


def refused() -> list[tuple[str, str]]:
    """(families, the reason) of what this version refuses."""
    rows = []
    for reason, (modules, kinds) in refusals.REASONS.items():
        names = [f"timm {modules}" if modules else "", f"transformers {kinds}" if kinds else ""]
        rows.append(("; ".join(filter(None, names)), reason))
    return [*rows, ("convolutional nets and other models without a row of blocks", refusals.NOT_A_VIT)]


def _summary(family: ModuleType) -> str:
    """The first sentence of a family's docstring."""
    return " ".join(family.__doc__.split("\n\n")[0].split()).rstrip(".")


def _of_all(family: ModuleType, say: Callable[[type[Adapter]], str], otherwise: str = "as inside") -> str:
    """What holds for the adapters of a family, which may differ, or is made up when a model is found."""
    kinds = [kind for kind in vars(family).values() if isinstance(kind, type) and issubclass(kind, Adapter)]
    mine = [kind for kind in kinds if kind.__module__ == family.__name__ and not kind.__name__.startswith("_")]
    said = dict.fromkeys(say(kind) for kind in mine)
    return " or ".join(said) or otherwise


def _takes_away(adapter: type[Adapter]) -> str:
    return "yes" if adapter.halves and not adapter.windows else "no"


def _positions(adapter: type[Adapter]) -> str:
    if issubclass(adapter, (RelativeAdapter, Windowed)):
        return "bias"
    return "rotary" if adapter.relative else "added"


def models(pattern: str, progress: Progress | None = None) -> list[tuple[str, str, str]]:
    """(name, "yes" or "no", remark) of each timm model that matches a shell pattern or holds a text.

    Each is built without memory for its weights and shown to the same code that converts.
    """
    wanted = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    names = [name for name in timm.list_models() if fnmatch(name, wanted)]
    rows = []
    with (progress or Progress()).track("models", len(names), unit="models") as advance:
        for name in names:
            rows.append((name, *_verdict(name)))
            advance(name)
    return rows


def _verdict(name: str) -> tuple[str, str]:
    try:
        with torch.device("meta"):
            adapter = adapter_of(timm.create_model(name, pretrained=False))
    except UnsupportedModelError as error:
        return "no", str(error)
    except Exception as error:  # some models cannot be built without memory
        return "?", f"could not be looked at: {gist(error)}"
    return "yes", f"{len(adapter.blocks)} layers, {adapter.heads} heads, {adapter.prefix} prefix tokens"
