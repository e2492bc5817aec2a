"""What makes library code keep image sizes open while it is exported, where it would note the size at hand."""

import builtins
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

SYMBOLS = (torch.SymInt, torch.SymFloat)


class _Stands(type):
    """Makes a class of this file answer to isinstance as the built-in type in whose place it stands."""

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, cls.stands_for)


class _Int(metaclass=_Stands):
    stands_for = int

    def __new__(cls, value=0, *base):
        return torch.sym_int(value) if isinstance(value, SYMBOLS) else builtins.int(value, *base)


class _Float(metaclass=_Stands):
    stands_for = float

    def __new__(cls, value=0.0):
        return torch.sym_float(value) if isinstance(value, SYMBOLS) else builtins.float(value)


@contextmanager
def open_numbers(modules: Iterable[str]) -> Iterator[None]:
    """Within this block the code of these Python modules makes no constants of symbolic sizes, by ``int``, ``float`` or
    transformers' ``torch_int``."""
    with ExitStack() as stack:
        for module in map(sys.modules.__getitem__, modules):
            stack.enter_context(mock.patch.multiple(module, create=True, int=_Int, float=_Float))
            if hasattr(module, "torch_int"):
                stack.enter_context(mock.patch.object(module, "torch_int", _Int))
        yield


class OpenRanges(TorchFunctionMode):
    """``torch.arange`` from a fraction to a symbolic end, whose length torch would make a constant."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.arange and len(args) == 2 and isinstance(args[0], float):
            start, end = args
            if isinstance(end, torch.SymInt) and 0 < start < 1:
                return torch.arange(end, **(kwargs or {})) + start
        return function(*args, **(kwargs or {}))
