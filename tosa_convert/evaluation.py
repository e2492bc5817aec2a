"""How well a converted model does its work: top-1 where there are labels, closeness to the original everywhere."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from tosa_convert.config import ConvertConfig, build_config
from tosa_convert.data import Images, check_classes, loader
from tosa_convert.errors import TosaError, UsageError
from tosa_convert.finetuning import outputs_of
from tosa_convert.hosts import host_of, run
from tosa_convert.origin import class_names, preprocessing_of
from tosa_convert.processes import pick_device
from tosa_convert.progress import Progress
from tosa_convert.surgery import convert, original

CLOSE = 0.999
"""Cosine from which on two feature vectors count as the same, for models without a head."""


def evaluate(
    models: nn.Module | dict[str, nn.Module],
    data: str | Path | None = None,
    *,
    reference: str | None = None,
    labels: bool = True,
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
        labels: False leaves the names of the folders aside: the pictures are not sorted by class.
        device: "cpu" or "cuda"; None takes a GPU if there is one. The models move there.

    Returns:
        {"images", "broken", "models": {name: figures}}. Figures: "top1" with labels; with a
        reference "agreement" (see :func:`agreement`) and "cosine" (mean over images of logits, or tokens).
    """
    models = {"model": models} if isinstance(models, nn.Module) else models
    first = next(iter(models.values()))
    images = Images(data, preprocessing_of(first))
    if reference is not None and reference not in models:
        raise UsageError(f"there is no model {reference!r} to compare with among {', '.join(models)}")
    labelled = labels and has_labels(images, first)
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
                inputs, truth = batch["images"].to(device), batch["labels"].to(device) if labelled else None
                found = {name: predict(model, inputs) for name, model in models.items()}
                against = found[reference][1] if reference else None
                for name, (kind, prediction) in found.items():
                    _add(sums[name], kind, prediction, truth, against)
            seen += count
            advance()
    if not seen:
        raise TosaError(f"not one of the {len(images)} pictures in {images.name} can be read")
    kept = [*(["top1"] if labelled else []), *(["agreement", "cosine"] if reference else [])]
    figures = {name: {key: sums[name][key] / seen for key in kept} for name in models}
    return {"data": images.name, "images": seen, "broken": broken, "models": figures}


def has_labels(images: Images, model: nn.Module) -> bool:
    """Whether the folders are the model's classes, so that top-1 can be counted.

    Raises:
        UsageError: they look like classes, but not like this model's.
    """
    if not outputs_of(model) or not (images.labelled or images.ambiguous):
        return False
    check_classes(images, outputs_of(model), class_names(model))
    return True


@torch.inference_mode()
def predict(model: nn.Module, images: torch.Tensor) -> tuple[str, torch.Tensor]:
    """The output that models are compared by and its name: logits, tokens, or the head's own."""
    kind, found = next(iter(run(model, images).items()))
    return kind, found.float()


def _add(
    sums: dict, kind: str, found: torch.Tensor, labels: torch.Tensor | None, reference: torch.Tensor | None
) -> None:
    if labels is not None:
        sums["top1"] += (found.argmax(-1) == labels).sum().item()
    if reference is not None:
        sums["agreement"] += agreement(kind, found, reference).sum().item()
        sums["cosine"] += F.cosine_similarity(found, reference, dim=-1).reshape(len(found), -1).mean(1).sum().item()


def agreement(kind: str, found: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Per image, in 0…1, how far two outputs say the same; an output that is not finite agrees with nothing.

    "logits" (B, classes): the same top-1. "tokens" (B, N, C): the share of tokens whose cosine is
    above 0.999. Anything else, such as a single score or a depth map: no value further off than a
    hundredth of the reference's standard deviation.
    """
    if kind == "logits" and found.shape[-1] > 1:
        agreed = (found.argmax(-1) == reference.argmax(-1)).float()
    elif kind == "tokens":
        agreed = (F.cosine_similarity(found, reference, dim=-1) > CLOSE).float().mean(1)
    else:
        furthest = (found - reference).abs().flatten(1).amax(1)
        agreed = (furthest <= 0.01 * reference[reference.isfinite()].std()).float()
    finite = found.flatten(1).isfinite().all(1) & reference.flatten(1).isfinite().all(1)
    return agreed * finite


def random_control(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of a converted model that chooses its tokens at random, at the same ratios and with the same bypass.

    EViT's fusing, which needs the class token's attention, becomes merging for good; and where random selection
    cannot be in the first layer, that one runs on all tokens.
    """
    config = model.tosa_config
    bypass = "persist" if config.bypass == "fuse" else config.bypass
    control = config.model_copy(update={"method": None, "score": "random", "bypass": bypass, "seed": seed})
    ratios = dict(config.plan(depth=len(host_of(model).blocks)))
    if control.listens_before:
        ratios.pop(1, None)
    if not ratios:
        raise UsageError("random selection cannot be in the first layer, and this model has no other selective one")
    options = {**control.model_dump(), "layers": list(ratios), "ratio": list(ratios.values())}
    return convert(original(model), build_config(ConvertConfig, options)).train(model.training)
