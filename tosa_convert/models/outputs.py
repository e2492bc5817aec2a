"""A model's main output: how many classes it has, and how far two of them agree."""

import torch
import torch.nn.functional as F
from torch import nn

from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.models.dense import DenseModel
from tosa_convert.models.modes import evaluating
from tosa_convert.models.provenance import preprocessing_of

EMBEDDING = "image_embeds"
"""The name of an output that is an embedding: the projection of CLIP and its like, which timm has as a head."""
CLOSE = 0.999
"""Cosine from which on two feature vectors count as the same, for models without a head."""


def outputs_of(model: nn.Module) -> int:
    """Number of classes of the model's head; 0 without one, or with a projection in its place."""
    adapter = adapter_of(model)
    if isinstance(model, DenseModel):
        return 0
    if adapter.library == "timm":
        return 0 if adapter.embeds else getattr(model, "num_classes", 0)  # a backbone has none
    return model.config.num_labels if "Classification" in type(model).__name__ else 0


def retrieval_agreement(found: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Per image, whether the same other image is nearest by both embeddings, (N, C) each; 1 where there is no other."""
    return (_nearest(found) == _nearest(reference)).float()


def _nearest(embeddings: torch.Tensor) -> torch.Tensor:
    normed = F.normalize(embeddings.float(), dim=-1)
    return (normed @ normed.mT).fill_diagonal_(-2.0).argmax(-1)


@torch.no_grad()
def last_norm(model: nn.Module) -> nn.Module | None:
    """What normalises tokens behind the last layer, by one pass over an empty image; None if nothing does."""
    adapter, preprocessing = adapter_of(model), preprocessing_of(model)
    inside = {module for block in adapter.blocks for module in block.modules()}
    found: list[nn.Module] = []
    behind: list[bool] = []
    handles = [adapter.blocks[-1].register_forward_hook(lambda *_: behind.append(True))]
    handles += [
        module.register_forward_hook(lambda module, *_: found.append(module) if behind else None)
        for module in model.modules()
        if "norm" in type(module).__name__.lower() and module not in inside
    ]
    weight = next(model.parameters())
    try:
        with evaluating(model):
            run(model, weight.new_zeros(1, preprocessing.channels, *preprocessing.size))
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


@torch.no_grad()
def predict(model: nn.Module, images: torch.Tensor, flip: bool = False) -> tuple[str, torch.Tensor]:
    """The output that models are compared by and its name: logits, tokens, or the head's own; with ``flip`` the mean of
    the maps of images and of their mirror images, mirrored back."""
    kind, found = next(iter(run(model, images).items()))
    if not flip:
        return kind, found.float()
    mirrored = predict(model, images.flip(-1))[1].flip(-1)
    return kind, (found.float() + mirrored) / 2


def agreement(kind: str, found: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Per image, in 0…1, how far two outputs say the same; an output that is not finite agrees with nothing.

    "logits" (B, classes): the same top-1. "tokens" (B, N, C): the share of tokens whose cosine is
    above 0.999; "image_embeds" (B, C): whether it is. Anything else, such as a single score or a depth map: the share
    of values that are no further off than a hundredth of the reference's standard deviation.
    """
    if kind == "logits" and found.shape[-1] > 1:
        agreed = (found.argmax(-1) == reference.argmax(-1)).float()
    elif kind == "tokens":
        agreed = (F.cosine_similarity(found, reference, dim=-1) > CLOSE).float().mean(1)
    elif kind == EMBEDDING:
        agreed = (F.cosine_similarity(found, reference, dim=-1) > CLOSE).float()
    else:
        near = (found - reference).abs() <= 0.01 * reference[reference.isfinite()].std()
        agreed = near.float().flatten(1).mean(1)
    finite = found.flatten(1).isfinite().all(1) & reference.flatten(1).isfinite().all(1)
    return agreed * finite
