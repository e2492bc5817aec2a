"""The share of the original's multiply–adds that a conversion has: what a search asks dozens of times, and what differs
from image to image where each keeps as many tokens as it needs."""

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tosa_convert.base.errors import UsageError
from tosa_convert.measure.macs import attention_macs, count_macs
from tosa_convert.models.adapter import run
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.selective.selection import keeps_any_number


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

    def of(self, converted: nn.Module, images: torch.Tensor | None = None) -> float:
        """Of a conversion of the original; the mean over images, which it needs where it keeps as many tokens as an
        image needs."""
        if keeps_any_number(converted):
            if images is None:
                raise UsageError("the number of tokens differs from image to image; give images")
            each = self.of_each(converted, images)
            return sum(each) / len(each)
        return 1 + (_count(converted) - self.base) / self.whole

    def of_each(self, converted: nn.Module, images: torch.Tensor) -> list[float]:
        """Of a conversion, for each of the images (B, C, H, W)."""
        return [1 + (_count(converted, image[None]) - self.base) / self.whole for image in images]


def _count(model: nn.Module, image: torch.Tensor | None = None) -> int:
    return tally(model, image, [])[0]


def tally(model: nn.Module, image: torch.Tensor | None, parts: list[nn.Module]) -> tuple[int, list[int]]:
    """Multiply–adds of one image (1, C, H, W), of the whole model and of some of its modules.

    Args:
        image: None is an empty one of the model's own size.
    """
    preprocessing, parameter = preprocessing_of(model), next(model.parameters())
    if image is None:
        image = torch.zeros(1, preprocessing.channels, *preprocessing.size)
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad(), _Counter(parts) as counter:
        try:
            run(model.eval(), image.to(parameter.device))
        finally:
            counter.leave()
            for module, training in modes.items():
                module.training = training
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
