"""Mixed precision on a CPU: attention stays in float32, whose backward pass is several times faster there."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


def attention_precision(device: str, precision: str) -> AbstractContextManager:
    """The context that a training runs in: attention in float32 for bf16 on a CPU, unchanged elsewhere.

    torch's fused attention for CPUs goes back through bf16 in a multiple of the time that float32 takes, so that bf16
    as a whole was slower than float32 for small models (``benchmarks/cpu_training.py``).
    """
    return Float32Attention() if (device, precision) == ("cpu", "bf16") else nullcontext()


class Float32Attention(TorchFunctionMode):
    """Works attention out in float32, whatever the autocast; its result comes back in the precision of its queries."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        asked = (kwargs["query"] if "query" in kwargs else args[0]).dtype
        wide = [_in_float32(each) for each in args]
        named = {name: _in_float32(each) for name, each in kwargs.items()}
        with torch.autocast("cpu", enabled=False):
            return function(*wide, **named).to(asked)


def _in_float32(value):
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
