"""The share of the original's multiply–adds that a conversion has: what a search asks dozens of times."""

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tosa_convert.measure.macs import attention_macs, count_macs
from tosa_convert.models.adapter import run
from tosa_convert.models.provenance import preprocessing_of


class MacsShare:
    """As fvcore counts, in a tenth of its time.

    fvcore traces a graph. Here the operators are counted as they run, which gives the same for all that a conversion
    changes, but not for every head: operators whose result is not used, and resampling, count differently. So the
    original is counted by fvcore, and of its conversions only the difference from it is counted here.

    Args:
        model: the original.
    """

    def __init__(self, model: nn.Module):
        self.whole, self.base = count_macs(model), _count(model)

    def of(self, converted: nn.Module) -> float:
        """Of a conversion of the original."""
        return 1 + (_count(converted) - self.base) / self.whole


def _count(model: nn.Module) -> int:
    preprocessing, parameter = preprocessing_of(model), next(model.parameters())
    image = torch.zeros(1, preprocessing.channels, *preprocessing.size, device=parameter.device)
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), _Counter() as counter:
            run(model.eval(), image)
    finally:
        for module, training in modes.items():
            module.training = training
    return counter.macs


class _Counter(TorchDispatchMode):
    """Adds up the multiply–adds of each operator that runs."""

    macs = 0

    def __torch_dispatch__(self, func: Any, types, args=(), kwargs=None):
        found, operator = func(*args, **(kwargs or {})), func.overloadpacket
        if operator is torch.ops.aten.native_layer_norm:
            self.macs += 5 * args[0].numel()  # as fvcore counts it
        elif "scaled_dot_product" in str(operator):  # one name for each device
            self.macs += attention_macs(*(value.shape for value in args[:3]))
        elif operator in flop_registry:
            self.macs += flop_registry[operator](*args, **(kwargs or {}), out_val=found) // 2
        return found
