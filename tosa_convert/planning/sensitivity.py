"""Curves of error over keep ratio, one per layer, around the ratios that a converted model has."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from tosa_convert.base.progress import Progress
from tosa_convert.measure.similarity import Keep, Outputs, error, observe
from tosa_convert.models.adapter import adapter_of
from tosa_convert.planning.allocation import FINE, Curves, Ratios
from tosa_convert.selective.conversion import set_ratios

Judged = tuple[torch.Tensor, Outputs, torch.Tensor]
"""Images (B, C, H, W), what the original gives for them, and how much the error of each counts, (B,)."""


def curves(
    probe: nn.Module, ratios: Ratios, step: float, batches: list[Judged], keep: Keep, what: str, progress: Progress
) -> Curves:
    """How much the weighted error changes with one layer's ratio, no further away than ``step``, all others fixed.

    Args:
        probe: converted, with all of ``ratios``' layers selective; its ratios are changed.
        keep: what the error is of.
        what: the name of the progress bar.
    """
    around = {
        layer: sorted({max(FINE[-1], round(ratio - step, 2)), min(1.0, round(ratio + step, 2))} - {ratio})
        for layer, ratio in ratios.items()
    }
    variants = [(layer, ratio) for layer, others in around.items() for ratio in others]
    found = _vary(probe, ratios, variants, batches, keep, what, progress)
    result = {}
    for layer, others in around.items():
        points = [(ratios[layer], 0.0), *((ratio, found[layer, ratio]) for ratio in others)]
        lowest, highest = min(others[0], ratios[layer]), max(others[-1], ratios[layer])
        options = np.array([ratio for ratio in FINE if lowest <= ratio <= highest])
        result[layer] = options, np.polyval(np.polyfit(*zip(*points, strict=True), len(points) - 1), options)
    return result


def _vary(
    probe: nn.Module,
    base: Ratios,
    variants: list[tuple[int, float]],
    batches: list[Judged],
    keep: Keep,
    what: str,
    progress: Progress,
) -> dict[tuple[int, float], float]:
    """How much the mean error of ``base`` changes with one layer's ratio changed, for each variant."""
    sums, count = dict.fromkeys(variants, 0.0), 0
    with progress.track(what, len(batches) * len(variants)) as advance:
        for images, wanted, weights in batches:
            count += len(images)
            set_ratios(probe, base)
            inputs, found = _inputs(probe, images)
            before = (error(found, wanted, keep) * weights).sum().item()
            for layer, ratio in variants:
                set_ratios(probe, {**base, layer: ratio})
                with _resumed(probe, inputs, layer):
                    errors = error(observe(probe, images), wanted, keep)
                sums[layer, ratio] += (errors * weights).sum().item() - before
                advance()
    return {variant: value / count for variant, value in sums.items()}


def _inputs(probe: nn.Module, images: torch.Tensor) -> tuple[dict[int, torch.Tensor], Outputs]:
    """What enters each layer, and the model's outputs."""
    caught, handles = {}, []
    for layer, block in enumerate(adapter_of(probe).blocks, start=1):
        handles.append(block.register_forward_pre_hook(_Catch(caught, layer)))
    found = observe(probe, images)
    for handle in handles:
        handle.remove()
    return caught, found


@contextmanager
def _resumed(probe: nn.Module, inputs: dict[int, torch.Tensor], layer: int) -> Iterator[None]:
    """Within this block the layers before ``layer`` cost nothing: they give what they gave before. Not where a
    score reads them."""
    adapter = adapter_of(probe)
    skipped = [] if probe.tosa_config.reads_before else adapter.blocks[: layer - 1]
    for block in skipped:
        block.forward = lambda *args, **kwargs: adapter.given_back(inputs[layer])
    try:
        yield
    finally:
        for block in skipped:
            del block.forward


class _Catch:
    def __init__(self, caught: dict, layer: int):
        self.caught, self.layer = caught, layer

    def __call__(self, module, inputs) -> None:
        self.caught[self.layer] = inputs[0]
