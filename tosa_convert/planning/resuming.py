"""Candidates of a search that begin at the same layer share what comes before it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from tosa_convert.models.adapter import adapter_of

Given = dict[int, Any]
"""Layer → what its block returned."""


@contextmanager
def catching(model: nn.Module, layers: int) -> Iterator[Given]:
    """Within this block a forward pass leaves what the first so many layers return."""
    given: Given = {}
    blocks = adapter_of(model).blocks[:layers]
    handles = [block.register_forward_hook(_Catch(given, layer)) for layer, block in enumerate(blocks, start=1)]
    try:
        yield given
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def resumed(probe: nn.Module, given: Given, first: int) -> Iterator[None]:
    """Within this block the layers before the ``first`` selective one cost nothing: each returns what it did before, so
    that what stands between them, or takes their outputs, does as before too. Not where a score reads them."""
    blocks = [] if probe.tosa_config.reads_before else adapter_of(probe).blocks[: min(first - 1, len(given))]
    for layer, block in enumerate(blocks, start=1):
        block.forward = _Return(given[layer])
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


class _Catch:
    def __init__(self, given: Given, layer: int):
        self.given, self.layer = given, layer

    def __call__(self, block, inputs, output) -> None:
        self.given[self.layer] = output


class _Return:
    def __init__(self, output: Any):
        self.output = output

    def __call__(self, *args, **kwargs) -> Any:
        return self.output
