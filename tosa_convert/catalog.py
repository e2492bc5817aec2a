"""Which models can be converted, and why the others cannot: asked of the hosts, not kept in a list."""

from fnmatch import fnmatch

import timm
import torch

from tosa_convert.errors import UnsupportedModelError
from tosa_convert.hosts import host_of
from tosa_convert.hosts.timm_vit import REFUSED
from tosa_convert.hosts.transformers_vit import PREFIX_TOKENS
from tosa_convert.progress import Progress

SERVED = ("vision_transformer", "deit", "vision_transformer_hybrid")
"""timm's modules that build VisionTransformers; models() asks each single model."""


def families() -> list[tuple[str, int | None, str, str]]:
    """(family, timm names in it, "yes" or "no", remark) of all that this version knows about."""
    rows = [
        (f"timm {module}", len(timm.list_models(module=module)), "yes", "ask with a pattern for single models")
        for module in SERVED[:2]
    ]
    rows += [(f"transformers {layer}", None, "yes", "every model built from it") for layer in sorted(PREFIX_TOKENS)]
    modules = [module for module in timm.list_modules() if module in REFUSED]
    return rows + [
        (f"timm {name}", len(timm.list_models(module=name)), "no", REFUSED[name]) for name in sorted(modules)
    ]


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
            host = host_of(timm.create_model(name, pretrained=False))
    except UnsupportedModelError as error:
        return "no", str(error)
    except Exception as error:  # some models cannot be built without memory
        return "?", f"could not be looked at: {' '.join(str(error).split())[:100]}"
    return "yes", f"{len(host.blocks)} layers, {host.heads} heads, {host.prefix} prefix tokens"
