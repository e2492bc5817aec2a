"""Candidates of a search that begin at the same layer share what comes before it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tosa_convert.models.adapter import Adapter, adapter_of

Entering = dict[int, torch.Tensor]
"""Layer → what holds the tokens that enter it."""


@contextmanager
def catching(model: nn.Module, layers: list[int]) -> Iterator[Entering]:
    """Within this block a forward pass leaves what enters these layers."""
    caught: Entering = {}
    adapter = adapter_of(model)
    handles = [
        adapter.blocks[layer - 1].register_forward_pre_hook(_Catch(adapter, caught, layer), with_kwargs=True)
        for layer in layers
    ]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def resumed(probe: nn.Module, entering: Entering, first: int) -> Iterator[None]:
    """Within this block the layers before the ``first`` selective one cost nothing: they give what they gave before.

    Not where a score reads them, nor where nothing is known of that layer; then those from the last known one on run.
    """
    adapter = adapter_of(probe)
    known = max((layer for layer in entering if layer <= first), default=1)
    skipped = [] if probe.tosa_config.reads_before else adapter.blocks[: known - 1]
    for block in skipped:
        block.forward = lambda *args, **kwargs: adapter.given_back(entering[known])
    try:
        yield
    finally:
        for block in skipped:
            del block.forward


class _Catch:
    def __init__(self, adapter: Adapter, caught: Entering, layer: int):
        self.adapter, self.caught, self.layer = adapter, caught, layer

    def __call__(self, block, args, kwargs) -> None:
        self.caught[self.layer] = self.adapter.entering(args, kwargs)[0]
