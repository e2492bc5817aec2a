"""Multiply–adds counted as operators run: quick, and true of the very image that is run."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tosa_convert.models.adapter import run
from tosa_convert.models.modes import evaluating
from tosa_convert.models.provenance import preprocessing_of


def tally(model: nn.Module, image: torch.Tensor | None, parts: list[nn.Module]) -> tuple[int, list[int]]:
    """Multiply–adds of one image (1, C, H, W), of the whole model and of some of its modules.

    Args:
        image: None is an empty one of the model's own size.
    """
    preprocessing, parameter = preprocessing_of(model), next(model.parameters())
    if image is None:
        image = torch.zeros(1, preprocessing.channels, *preprocessing.size)
    with torch.no_grad(), evaluating(model), _Counter(parts) as counter:
        try:
            run(model, image.to(parameter.device))
        finally:
            counter.leave()
    return counter.macs, counter.each


class _Counter(TorchDispatchMode):
    """Adds up the multiply–adds of each operator that runs, and of those that run in some modules."""

    def __init__(self, parts: list[nn.Module]):
        super().__init__()
        self.macs, self.each, self.begun = 0, [0] * len(parts), [0] * len(parts)
        self.hooks = []
        for index, part in enumerate(parts):
            self.hooks.append(part.register_forward_pre_hook(lambda *_, at=index: self._begin(at)))
            self.hooks.append(part.register_forward_hook(lambda *_, at=index: self._end(at)))

    def _begin(self, index: int) -> None:
        self.begun[index] = self.macs

    def _end(self, index: int) -> None:
        self.each[index] += self.macs - self.begun[index]

    def leave(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types, args=(), kwargs=None):
        found, operator = func(*args, **(kwargs or {})), func.overloadpacket
        if operator is torch.ops.aten.native_layer_norm:
            self.macs += 5 * args[0].numel()  # as fvcore counts it
        elif "scaled_dot_product" in str(operator):  # one name for each device
            self.macs += attention_macs(*(value.shape for value in args[:3]))
        elif operator in flop_registry:
            self.macs += flop_registry[operator](*args, **(kwargs or {}), out_val=found) // 2
        return found


def attention_macs(queries: Sequence[int], keys: Sequence[int], values: Sequence[int]) -> int:
    """B·H·Nq·Nk·(dq + dv) of these shapes: QKᵀ and the weighted sum of the values."""
    return prod(queries[:-1]) * keys[-2] * (queries[-1] + values[-1])
