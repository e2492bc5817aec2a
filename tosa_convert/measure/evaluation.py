"""How well a converted model does its task where there are labels, and how close it is to the original everywhere."""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from tosa_convert.base.distributed import pick_device
from tosa_convert.base.errors import TosaError, UsageError
from tosa_convert.base.progress import Progress
from tosa_convert.config.conversion import ConvertConfig
from tosa_convert.config.options import over
from tosa_convert.config.segments import as_option
from tosa_convert.config.validation import build
from tosa_convert.data.images import loader
from tosa_convert.methods.bypass import Bypass
from tosa_convert.methods.method import control, published
from tosa_convert.methods.score import Score
from tosa_convert.models.adapter import adapter_of
from tosa_convert.models.outputs import EMBEDDING, agreement, outputs_of, predict, retrieval_agreement
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.selective.conversion import convert, is_converted, original
from tosa_convert.selective.selection import selective_blocks
from tosa_convert.tasks.task import Task, task_of


def evaluate(
    models: nn.Module | dict[str, nn.Module],
    data: str | Path | None = None,
    *,
    reference: str | None = None,
    labels: bool = True,
    batch_size: int = 64,
    workers: int = 0,
    flip: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> dict:
    """Measure one model, or several on the same images in the same pass.

    Args:
        models: a model, or name → model.
        data: folder of images; class sub-folders give top-1. None takes the built-in photos.
        reference: name of the model that the others are compared with.
        labels: False ignores the names of sub-folders: they are not classes.
        flip: take the mean of the maps of each image and of its mirror image, mirrored back.
        device: "cpu" or "cuda"; None takes a GPU if there is one. The models move there.

    Returns:
        {"data", "images", "broken", "unknown", "models": {name: figures}}. Figures: with labels the metrics of the
        model's task, such as "top1"; with a reference "agreement" (see :func:`tosa_convert.models.outputs.agreement`;
        of embeddings the share of images with the same nearest other image) and "cosine" (mean over images of logits,
        embeddings, or tokens), of maps the differences of their task. "unknown" is how many images have a map in which
        nothing is known; they count for no metric.
    """
    models = {"model": models} if isinstance(models, nn.Module) else models
    if not models:
        raise UsageError("no models were given; give one, or name → model")
    first = next(iter(models.values()))
    task = task_of(first)
    images = task.read(data, preprocessing_of(first))
    if reference is not None and reference not in models:
        raise UsageError(f"there is no model {reference!r} to compare with among {', '.join(models)}")
    labelled = labels and task.has_labels(images, first)
    if labelled and images.reader.streams:  # each label is looked at as it comes
        images.outputs = outputs_of(first)
    if flip and not task.differences:
        raise UsageError("--flip is for maps, and this model gives none; leave it out")
    device = pick_device(device)
    for model in models.values():
        model.to(device).eval()
    against_original = task.differences or ("agreement", "cosine")
    kept = [*(task.metrics if labelled else ()), *(against_original if reference else ())]
    sums = {name: dict.fromkeys(kept, 0.0) for name in models}
    tallies: dict = dict.fromkeys(models, 0.0)
    embeddings: dict[str, list[torch.Tensor]] = {name: [] for name in models}
    seen, unknown, broken = 0, 0, []
    batches = loader(images, batch_size, workers)
    total = None if images.reader.streams else len(batches)
    with (progress or Progress()).track("eval", total, unit="images", per_step=batch_size) as advance:
        for batch in batches:
            broken += batch["broken"]
            count = len(batch["images"])
            if count:
                inputs, truth = batch["images"].to(device), batch["labels"].to(device) if labelled else None
                found = {name: predict(model, inputs, flip) for name, model in models.items()}
                known = None if truth is None else task.known(truth)
                against = found[reference][1] if reference else None
                for name, (kind, prediction) in found.items():
                    if reference and kind == EMBEDDING:
                        embeddings[name].append(prediction.cpu())
                    for key, values in _figures(task, kind, prediction, truth, against).items():
                        sums[name][key] += (values[known] if key in task.metrics else values).sum().item()
                    if truth is not None and task.overall:
                        tallies[name] += task.tally(prediction, truth)
                unknown += 0 if known is None else int((~known).sum())
            seen += count
            advance()
    if not seen:
        if not broken:
            raise TosaError(f"the stream {images.name} holds no images")
        raise TosaError(f"not one of the {len(broken)} images in {images.name} can be read: {broken[0]}")
    if unknown == seen:
        raise TosaError(f"in none of the maps of {images.name} anything is known; check its files")
    counts = {key: seen - unknown if key in task.metrics else seen for key in kept}
    figures = {name: {key: total / counts[key] for key, total in totals.items()} for name, totals in sums.items()}
    if labelled and task.overall:
        figures = {name: task.concluded(tallies[name]) | found for name, found in figures.items()}
    for name, parts in embeddings.items():
        if parts and reference:  # among all images, not within a batch
            same = retrieval_agreement(torch.cat(parts), torch.cat(embeddings[reference]))
            figures[name]["agreement"] = same.mean().item()
    return {"data": images.name, "images": seen, "broken": broken, "unknown": unknown, "models": figures}


def _figures(
    task: Task, kind: str, found: torch.Tensor, labels: torch.Tensor | None, reference: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Name → values per image."""
    figures = {} if labels is None else task.measure(found, labels)
    if reference is not None:
        if task.differences:
            return figures | task.difference(found, reference)
        figures["agreement"] = agreement(kind, found, reference)
        figures["cosine"] = F.cosine_similarity(found, reference, dim=-1).reshape(len(found), -1).mean(1)
    return figures


def is_control(model: nn.Module) -> bool:
    """Whether a converted model chooses its tokens at random already."""
    return model.tosa_config.score == published()[control()].score


def random_control(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of a converted model that chooses its tokens at random, at the same ratios and with the same bypass.

    Where each image keeps as many tokens as it needs, the control keeps as many, chosen at random; where gates weigh
    what layers add to a token, it is weighed by as much.
    EViT's fusing, which needs the class token's attention, becomes ToMe's merging; and where random selection
    cannot be in the first layer, that one runs on all tokens.
    """
    if not is_converted(model):
        raise UsageError("random_control takes a converted model, whose ratios and bypass it keeps; convert it first")
    config = model.tosa_config
    if config.threshold is not None or config.part(Score).gates:
        copied = copy.deepcopy(model)
        for block in selective_blocks(copied):
            block.selection.chance = seed
        return copied
    bypass = config.make(Bypass)
    parts = {"score": published()[control()].score, "bypass": bypass.without_weights or config.bypass}
    ratios = dict(config.plan(depth=len(adapter_of(model).blocks)))
    segments = config.segments(list(ratios))
    chosen = build(ConvertConfig, {**over(config.model_dump(), parts), "method": None, "layers": None, "seed": seed})
    if chosen.reads_before:
        ratios.pop(1, None)
        segments = [[layer for layer in segment if layer > 1] for segment in segments]
    if not ratios:
        raise UsageError("random selection cannot be in the first layer, and this model has no other selective one")
    shared = as_option([segment for segment in segments if segment]) if chosen.make(Bypass).shares else 1
    chosen = chosen.model_copy(update={"layers": list(ratios), "ratio": list(ratios.values()), "segment": shared})
    return convert(original(model), chosen).train(model.training)
