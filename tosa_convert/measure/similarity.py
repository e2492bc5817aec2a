"""How near a model's outputs are to the original's: its tokens, and what its head makes of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from tosa_convert.models.adapter import adapter_of
from tosa_convert.models.outputs import agreement
from tosa_convert.models.proof.calls import first_of


@dataclass(frozen=True)
class Outputs:
    """What one forward pass gave.

    Attributes:
        kind: of the output: "logits", "tokens", or the head's own.
        output: as :meth:`tosa_convert.models.adapter.Adapter.outputs` gives it.
        patches: (B, N, C) patch tokens; of models with a head those after the last layer.
        classes: (B, C) the class token, None where there is none.
    """

    kind: str
    output: torch.Tensor
    patches: torch.Tensor
    classes: torch.Tensor | None


def observe(model: nn.Module, images: torch.Tensor) -> Outputs:
    """Run a model, converted or not, on (B, C, H, W)."""
    adapter = adapter_of(model)
    with torch.inference_mode(), _behind(adapter.blocks[-1]) as caught:
        found = adapter.outputs(images.to(next(model.parameters()).dtype))
    kind, output = next(iter(found.items()))
    tokens = (output if kind == "tokens" else caught[0]).float()
    classes = tokens[:, 0] if adapter.class_token else None
    return Outputs(kind, output.float(), tokens[:, adapter.prefix :], classes)


@contextmanager
def _behind(block: nn.Module) -> Iterator[list[torch.Tensor]]:
    caught: list[torch.Tensor] = []
    handle = block.register_forward_hook(lambda _, __, output: caught.append(first_of(output)))
    try:
        yield caught
    finally:
        handle.remove()


def figures(found: Outputs, wanted: Outputs) -> dict[str, torch.Tensor]:
    """Per image: "patch" and "class", cosines to the original's tokens ("patch" not where patches are gone),
    and with a head "agreement", see :func:`tosa_convert.measure.evaluation.agreement`."""
    result = {}
    if found.patches.shape == wanted.patches.shape:
        result["patch"] = F.cosine_similarity(found.patches, wanted.patches, dim=-1).mean(1)
    if found.classes is not None:
        result["class"] = F.cosine_similarity(found.classes, wanted.classes, dim=-1)
    if wanted.kind != "tokens":
        result["agreement"] = agreement(wanted.kind, found.output, wanted.output)
    return result


def error(found: Outputs, wanted: Outputs) -> torch.Tensor:
    """Per image, what a plan makes small. Of a classifier KL(original ‖ converted) of its logits, in nats;
    otherwise 1 − cosine of patch tokens plus 1 − cosine of the class token."""
    if wanted.kind == "logits" and wanted.output.shape[-1] > 1:
        logs, theirs = found.output.log_softmax(-1), wanted.output.log_softmax(-1)
        return (theirs.exp() * (theirs - logs)).sum(-1)
    cosines = figures(found, wanted)
    return sum(1 - cosines[name] for name in ("patch", "class") if name in cosines)
