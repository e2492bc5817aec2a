"""How well a converted model does its work: top-1 where there are labels, closeness to the original everywhere."""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from tosa_convert.data import Images, check_classes, loader
from tosa_convert.errors import TosaError
from tosa_convert.finetuning import outputs_of
from tosa_convert.hosts import host_of
from tosa_convert.origin import origin_of
from tosa_convert.processes import pick_device
from tosa_convert.progress import Progress
from tosa_convert.scores.random import RandomScore
from tosa_convert.selective import selective_blocks

CLOSE = 0.999
"""Cosine from which on two feature vectors count as the same, for models without a head."""


def evaluate(
    models: nn.Module | dict[str, nn.Module],
    data: str | Path | None = None,
    *,
    reference: str | None = None,
    batch_size: int = 64,
    workers: int = 0,
    device: str | None = None,
    progress: Progress | None = None,
) -> dict:
    """Measure one model, or several on the same pictures in the same pass.

    Args:
        models: a model, or name → model.
        data: folder of images; class sub-folders give top-1. None takes the built-in photos.
        reference: name of the model that the others are compared with.
        device: "cpu" or "cuda"; None takes a GPU if there is one. The models move there.

    Returns:
        {"images", "broken", "models": {name: figures}}. Figures: "top1" with labels; with a
        reference "agreement" (same top-1, or for models without a head the share of tokens whose
        cosine to the reference is above 0.999) and "cosine" (mean over images of logits, or tokens).
    """
    models = {"model": models} if isinstance(models, nn.Module) else models
    first = next(iter(models.values()))
    images = Images(data, origin_of(first).preprocessing)
    labelled = images.labelled and outputs_of(first) > 0
    if labelled:
        check_classes(images, outputs_of(first))
    device = pick_device(device)
    for model in models.values():
        model.to(device).eval()
    sums = {name: dict.fromkeys(("top1", "agreement", "cosine"), 0.0) for name in models}
    seen, broken = 0, []
    batches = loader(images, batch_size, workers)
    with (progress or Progress()).track("eval", len(batches), unit="images", per_step=batch_size) as advance:
        for batch in batches:
            broken += batch["broken"]
            count = len(batch["images"])
            if count:
                found = {name: predict(model, batch["images"].to(device)) for name, model in models.items()}
                for name, prediction in found.items():
                    _add(sums[name], prediction, batch["labels"].to(device) if labelled else None, found.get(reference))
            seen += count
            advance()
    if not seen:
        raise TosaError(f"not one of the {len(images)} pictures in {images.name} can be read")
    kept = [*(["top1"] if labelled else []), *(["agreement", "cosine"] if reference else [])]
    figures = {name: {key: sums[name][key] / seen for key in kept} for name in models}
    return {"data": images.name, "images": seen, "broken": broken, "models": figures}


@torch.inference_mode()
def predict(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The output that models are compared by: logits (B, classes), tokens (B, N, C), or the head's own."""
    return next(iter(host_of(model).outputs(images).values())).float()


def _add(sums: dict, found: torch.Tensor, labels: torch.Tensor | None, reference: torch.Tensor | None) -> None:
    if labels is not None:
        sums["top1"] += (found.argmax(-1) == labels).sum().item()
    if reference is not None:
        sums["agreement"] += agreement(found, reference).sum().item()
        sums["cosine"] += F.cosine_similarity(found, reference, dim=-1).reshape(len(found), -1).mean(1).sum().item()


def agreement(found: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Per image, in 0…1: the same top-1 for logits (B, classes); the share of close vectors for anything else."""
    if found.ndim == 2:
        return (found.argmax(-1) == reference.argmax(-1)).float()
    close = F.cosine_similarity(found, reference, dim=-1) > CLOSE
    return close.float().reshape(len(found), -1).mean(1)


def random_control(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of a converted model whose selective layers choose their tokens at random, at the same ratios."""
    twin = copy.deepcopy(model)
    for block in selective_blocks(twin):
        block.selector = RandomScore(seed, block.selection.layer)
    return twin
