"""Multiply–adds over real images, where each keeps as many tokens as it needs."""

from dataclasses import replace

import torch
from torch import nn

from tosa_convert.base.progress import Progress
from tosa_convert.measure.macs import Cost, LayerCost, flops
from tosa_convert.measure.macs_share import tally
from tosa_convert.models.adapter import adapter_of
from tosa_convert.selective.conversion import original
from tosa_convert.selective.selection import last_choices, selective_blocks


def flops_over(model: nn.Module, images: torch.Tensor, progress: Progress | None = None) -> Cost:
    """:func:`tosa_convert.measure.macs.flops` of a model, as the mean over images, with the least and the most.

    Args:
        images: (B, C, H, W), preprocessed.
    """
    twin = original(model)
    before, blocks = flops(twin, tuple(images.shape[-2:])), adapter_of(model).blocks
    selective = {block.selection.layer: block for block in selective_blocks(model)}
    choosers = [[part for part in (block.selector, block.matcher) if part] for block in selective.values()]
    whole, layers = tally(twin, images[:1], adapter_of(twin).blocks)
    totals, tokens, parts = [], torch.zeros(len(blocks)), torch.zeros(len(blocks) + sum(map(len, choosers)))
    with (progress or Progress()).track("count", len(images)) as advance:
        for image in images:
            total, each = tally(model, image[None], [*blocks, *sum(choosers, [])])
            totals.append(before.macs + total - whole)
            parts += torch.tensor(each, dtype=torch.float) / len(images)
            tokens += torch.tensor(_attending(model, before.patches)) / len(images)
            advance()
    choosing = iter(parts[len(blocks) :].tolist())
    selectors = {layer: sum(next(choosing) for _ in own) for layer, own in zip(selective, choosers, strict=True)}
    mean = [
        LayerCost(
            layer=plain.layer,
            tokens=round(tokens[index].item(), 1),
            macs=round(plain.macs + parts[index].item() - layers[index]),
            selector=round(selectors.get(plain.layer, 0)),
            original=plain.macs,
        )
        for index, plain in enumerate(before.layers)
    ]
    return replace(
        before,
        macs=round(sum(totals) / len(totals)),
        selectors=sum(layer.selector for layer in mean),
        layers=mean,
        least=min(totals),
        most=max(totals),
        images=len(images),
    )


def _attending(model: nn.Module, patches: int) -> list[float]:
    """How many patches of the last image attended in each layer."""
    adapter, choices = adapter_of(model), last_choices(model)
    per_head = any(block.selection.per_head for block in selective_blocks(model))
    counts = {} if per_head else {layer: choice.attended.shape[1] - adapter.prefix for layer, choice in choices.items()}
    return [float(counts.get(layer, patches)) for layer in range(1, len(adapter.blocks) + 1)]
