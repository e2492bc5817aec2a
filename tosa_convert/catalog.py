"""Which models can be converted, and why the others cannot: asked of the hosts, not kept in a list."""

from fnmatch import fnmatch

import timm
import torch

from tosa_convert.errors import UnsupportedModelError
from tosa_convert.hosts import host_of, refusals, served
from tosa_convert.progress import Progress


def families() -> list[tuple[str, int | None, str, str]]:
    """(families, number of timm names, "yes" or "no", remark) of all that this version knows about."""
    count = {module: len(timm.list_models(module=module)) for module in timm.list_modules()}
    ours = served("TIMM")
    rows = [
        (f"timm: {', '.join(ours)}", sum(count[module] for module in ours), "yes", "most; ask with a pattern"),
        (f"transformers: {', '.join(served('TRANSFORMERS'))}", None, "yes", "any model built from these layers"),
    ]
    for reason, (modules, _) in refusals.REASONS.items():
        known = [module for module in modules.split() if module in count]
        rows.append((f"timm: {', '.join(known)}", sum(count[module] for module in known), "no", reason))
    others = [module for module in count if module not in ours and module not in refusals.TIMM]
    rows.append(("timm: all others", sum(count[module] for module in others), "no", refusals.NOT_A_VIT))
    return rows


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
