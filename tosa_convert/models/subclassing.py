"""Stepping into a model without copying its forward: an instance is turned into a subclass of its own class.

A model keeps its structure, its forward loop and its state-dict keys. A subclass made here is pickled and copied by
how it is made, since it has no place to be imported from.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from tosa_convert.base.errors import TosaError, UsageError
from tosa_convert.base.thread_local import PerThread


def grafted_class(kind: str, base: type[nn.Module], make: tuple, **members: Any) -> type[nn.Module]:
    """A subclass for instances of ``base`` to be turned into, and back again.

    Args:
        kind: the beginning of its name.
        make: the function, and its arguments, that give this class again.
    """

    def reduce(self, protocol):
        return _again, tuple(map(_told, make)), self.__dict__.copy()

    about = {"grafted_on": base, "made_by": make, "__module__": base.__module__, "__reduce_ex__": reduce}
    return type(f"{kind}{base.__name__}", (base,), {**members, **about})


class _Made(NamedTuple):
    """A grafted class among the arguments of another: the function that gives it, and its arguments."""

    by: tuple


def _told(part: Any) -> Any:
    made = vars(part).get("made_by") if isinstance(part, type) else None
    return part if made is None else _Made(tuple(map(_told, made)))


def _found(part: Any) -> Any:
    if not isinstance(part, _Made):
        return part
    make, *arguments = map(_found, part.by)
    return make(*arguments)


def _again(make: Callable, *arguments: Any) -> nn.Module:
    kind = make(*map(_found, arguments))
    return kind.__new__(kind)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module was made with."""
    return ungrafted(type(module))


def ungrafted(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that one was made of here, or that class itself."""
    while (base := getattr(kind, "grafted_on", None)) is not None:
        kind = base
    return kind


def ungraft(module: nn.Module) -> bool:
    """Turn a module back into what it was; whether there was anything to do."""
    grafted = False
    while (base := getattr(type(module), "grafted_on", None)) is not None:
        module.__class__ = base
        grafted = True
    module.__dict__.pop("steering", None)
    return grafted


@functools.cache
def heard_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass for a block in which a tap stands. torch.compile tells blocks apart by class, not by hooks: what it
    compiled for a block without a tap would run this one without."""
    return grafted_class("Heard", base, (heard_class, base))


class Unheard:
    """An answer that hooks on the module do not hear of: the module runs at another time, or on other tokens."""

    def __init__(self, answer: Callable):
        self.answer = answer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer(*args, **kwargs)


@functools.cache
def steered_class(base: type[nn.Module], method: str) -> type[nn.Module]:
    """A subclass with a method that something else answers while it is :func:`answered`."""
    own = getattr(base, method)

    def steered(self, *args, **kwargs):
        answer = self.steering[method].get()
        return own(self, *args, **kwargs) if answer is None else answer(*args, **kwargs)

    def called(self, *args, **kwargs):
        answer = self.steering[method].get()
        return answer(*args, **kwargs) if isinstance(answer, Unheard) else base.__call__(self, *args, **kwargs)

    members = {method: steered} | ({"__call__": called} if method == "forward" else {})
    return grafted_class("Steered", base, (steered_class, base, method), **members)


def check_own(module: nn.Module, method: str = "forward") -> None:
    """What a method of a module calls is its class's.

    Raises:
        UsageError: something hangs another one on the module itself, which would go past its class.
    """
    own = vars(module).get(method)
    if getattr(own, "__self__", None) is module and getattr(own, "__func__", None) is getattr(type(module), method):
        delattr(module, method)  # as accelerate leaves it when it takes its hooks off
    elif own is not None:
        raise UsageError(
            f"something has replaced {method} of a {type(module).__name__}, as accelerate's hooks (device_map) do, so "
            "its layer cannot be converted; load the model without it, and convert it first"
        )


def steer(module: nn.Module, method: str = "forward") -> None:
    """Make a module one whose method can be :func:`answered`."""
    steering = module.__dict__.setdefault("steering", {})
    if method not in steering:
        steering[method] = PerThread()
        module.__class__ = steered_class(type(module), method)


def is_answered(module: nn.Module) -> bool:
    """Whether something answers for a module's forward now, in this thread."""
    steering = getattr(module, "steering", {})
    return "forward" in steering and steering["forward"].get() is not None


@contextmanager
def answered(module: nn.Module, answer: Callable, method: str = "forward", otherwise: bool = False) -> Iterator[None]:
    """Within this block, and in this thread, ``answer`` is called in place of a steered module's method.

    Args:
        otherwise: only if nothing answers for it already.

    Raises:
        TosaError: the module has taken the place of the one that was steered.
    """
    steering = getattr(module, "steering", {})
    if method not in steering:
        raise TosaError(
            f"a {type(module).__name__} of a selective layer was replaced after the conversion; replace modules first, "
            "then convert the model"
        )
    before = steering[method].get()
    if not (otherwise and before is not None):
        steering[method].set(answer)
    try:
        yield
    finally:
        steering[method].set(before)
