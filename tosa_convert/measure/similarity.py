"""How near a model's outputs are to the original's: its tokens, and what its head makes of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import nn

from tosa_convert.base.errors import UsageError
from tosa_convert.models.adapter import Adapter, adapter_of
from tosa_convert.models.outputs import EMBEDDING, agreement
from tosa_convert.models.proof.calls import first_of
from tosa_convert.tasks.task import Task, task_of

Call = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Outputs:
    """What one forward pass gave.

    Attributes:
        kind: of the output: "logits", "tokens", or the head's own.
        output: as :meth:`tosa_convert.models.adapter.Adapter.outputs` gives it.
        patches: (B, N, C) patch tokens; of models with a head those after the last layer.
        classes: (B, C) the class token, None where there is none.
        pooled: (B, C) features or embedding of the image; of a classifier what its logits are made from, of a model
            with another head its class token.
        task: what the model is for.
    """

    task: Task
    kind: str
    output: torch.Tensor
    patches: torch.Tensor
    classes: torch.Tensor | None
    pooled: torch.Tensor | None


def observe(model: nn.Module, images: torch.Tensor) -> Outputs:
    """Run a model, converted or not, on (B, C, H, W)."""
    adapter = adapter_of(model)
    with torch.no_grad(), _behind(adapter.blocks[-1]) as caught, _around_linears(adapter) as calls:
        found = adapter.outputs(images.to(next(model.parameters()).dtype))
    kind, output = next(iter(found.items()))
    tokens = adapter.taken(caught[0])
    if kind == "tokens" and output.shape[1] == tokens.shape[1]:  # not where patches are pooled behind the blocks
        tokens = adapter.taken(output)
    tokens = tokens.float()
    classes = tokens[:, 0] if adapter.class_token else None
    pooled = found.get("features", output if kind == EMBEDDING else classes)
    if kind == "logits":
        pooled = _before(output, calls)
    pooled = None if pooled is None else pooled.float().flatten(1)
    return Outputs(task_of(model), kind, output.float(), tokens[:, adapter.prefix :], classes, pooled)


@contextmanager
def _behind(block: nn.Module) -> Iterator[list[torch.Tensor]]:
    caught: list[torch.Tensor] = []
    handle = block.register_forward_hook(lambda _, __, output: caught.append(first_of(output)))
    try:
        yield caught
    finally:
        handle.remove()


@contextmanager
def _around_linears(adapter: Adapter) -> Iterator[list[Call]]:
    """Input and output of each linear layer outside of the blocks that takes (B, C)."""
    within = {part for block in adapter.blocks for part in block.modules()}
    linears = [part for part in adapter.model.modules() if isinstance(part, nn.Linear) and part not in within]
    calls: list[Call] = []

    def note(_, given: tuple, output: torch.Tensor) -> None:
        if given[0].ndim == 2:
            calls.append((given[0], output))

    handles = [part.register_forward_hook(note) for part in linears]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _before(logits: torch.Tensor, calls: list[Call]) -> torch.Tensor | None:
    """What the logits are made from: what went into the layers that gave as much, one or, as with DeiT's distillation
    token, two; None if none did."""
    given = [features for features, output in calls if output.shape == logits.shape]
    return torch.cat(given, dim=-1) if given else None


def figures(found: Outputs, wanted: Outputs) -> dict[str, torch.Tensor]:
    """Per image: "patch" and "class", cosines to the original's tokens ("patch" not where patches are gone), with an
    embedding "pooled", its cosine, with a head that makes maps the differences of its task, and with another head
    "agreement", see :func:`tosa_convert.models.outputs.agreement`."""
    result = {}
    if found.patches.shape == wanted.patches.shape:
        result["patch"] = F.cosine_similarity(found.patches, wanted.patches, dim=-1).mean(1)
    if found.classes is not None:
        result["class"] = F.cosine_similarity(found.classes, wanted.classes, dim=-1)
    if wanted.kind == EMBEDDING:
        result["pooled"] = F.cosine_similarity(found.output, wanted.output, dim=-1)
    elif wanted.task.differences:
        result |= wanted.task.difference(found.output, wanted.output)
    elif wanted.kind != "tokens":
        result["agreement"] = agreement(wanted.kind, found.output, wanted.output)
    return result


A_MAP = "a map"


class Keep(StrEnum):
    """What of a model's outputs is to stay as it is."""

    PATCHES = "patches"  # and the class token
    POOLED = "pooled"
    LOGITS = "logits"
    MAP = "map"


def settled_keep(wanted: Outputs, keep: str | None) -> Keep:
    """What is to stay as it is, of a model that gives this: what is asked for; by default the logits of a classifier,
    a map where that is what it gives, otherwise the tokens, from which everything else is made.

    Raises:
        UsageError: there is nothing of the kind.
    """
    if keep is not None and keep not in list(Keep):
        raise UsageError(f"keep {keep!r} is not known; choose {', '.join(Keep)}")
    kind = _kind(wanted)
    there = {
        Keep.LOGITS: kind == "logits" and wanted.output.shape[-1] > 1,
        Keep.MAP: kind == A_MAP,
        Keep.POOLED: wanted.pooled is not None,
        Keep.PATCHES: True,
    }
    if keep is None:
        return next(each for each in (Keep.MAP, Keep.LOGITS, Keep.PATCHES) if there[each])
    if not there[Keep(keep)]:
        names = {Keep.LOGITS: "logits of classes", Keep.MAP: "map", Keep.POOLED: "pooled features"}
        others = " or ".join(name for name, known in there.items() if known)
        raise UsageError(f"this model gives no {names[Keep(keep)]} to keep, its output is {kind}; keep {others}")
    return Keep(keep)


def _kind(wanted: Outputs) -> str:
    """What a model's output is."""
    return A_MAP if wanted.output.ndim > 2 and wanted.kind != "tokens" else wanted.kind


def losses(found: Outputs, wanted: Outputs, keep: Keep) -> list[torch.Tensor]:
    """Per image, what is lost of what is to be kept: of patches 1 − cosine of the patch tokens, and of the class token;
    of pooled features 1 − cosine; of logits the same of the features that they are made from, where the model has such,
    otherwise KL(original ‖ converted) in nats; of a map what its task says, see
    :meth:`tosa_convert.tasks.task.Task.error`.

    A few images say more by their features than by their logits, whose KL is next to nothing for most and large for
    those near the border of two classes: plans made by it were several times worse on other images, in that KL too.
    """
    if keep is Keep.LOGITS and found.pooled is None:
        logs, theirs = found.output.log_softmax(-1), wanted.output.log_softmax(-1)
        return [(theirs.exp() * (theirs - logs)).sum(-1)]
    if keep is Keep.MAP:
        return [wanted.task.error(found.output, wanted.output)]
    if keep in (Keep.POOLED, Keep.LOGITS):
        return [1 - F.cosine_similarity(found.pooled, wanted.pooled, dim=-1)]
    cosines = figures(found, wanted)
    return [1 - cosines[name] for name in ("patch", "class") if name in cosines]


def error(found: Outputs, wanted: Outputs, keep: Keep) -> torch.Tensor:
    """Per image, what a plan makes small: the sum of the :func:`losses`."""
    return sum(losses(found, wanted, keep), torch.zeros(len(wanted.output), device=wanted.output.device))
