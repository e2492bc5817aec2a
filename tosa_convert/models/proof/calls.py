"""What the modules of a model are called with, and what they answer: the material of a proof."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from tosa_convert.base.errors import UnsupportedModelError


class NotProvenError(UnsupportedModelError):
    """Something that was found does not do what it has to do; the message says what and where."""


class Call(NamedTuple):
    """The first call of a module."""

    args: tuple
    kwargs: dict
    output: Any

    @property
    def tokens(self) -> torch.Tensor | None:
        """(B, N, C): the first tensor of this shape among the arguments."""
        return next((value for value in (*self.args, *self.kwargs.values()) if is_tokens(value)), None)

    @property
    def result(self) -> torch.Tensor | None:
        """The output, or the first of several."""
        return first_of(self.output)


def is_tokens(value: Any) -> bool:
    """Whether it looks like (B, N, C)."""
    return isinstance(value, torch.Tensor) and value.ndim == 3 and value.is_floating_point()


def first_of(output: Any) -> torch.Tensor | None:
    """A module's main output: itself, or the first of several."""
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, torch.Tensor) else None


def how_many(output: Any) -> int:
    """How many values a module returns; 0 for a bare tensor."""
    return len(output) if isinstance(output, (tuple, list)) else 0


def packed(count: int, *values: Any) -> Any:
    """The first value on its own, or so many in a tuple, as :func:`how_many` counts them."""
    return (*values, *[None] * count)[:count] if count else values[0]


def record(modules: dict[str, nn.Module], run: Callable[[], Any]) -> dict[str, Call]:
    """Name → the first call of each of these modules while something runs; those that are not called are left out."""
    calls: dict[str, Call] = {}
    handles = []
    for name, module in modules.items():

        def note(module, args, kwargs, output, name=name):
            calls.setdefault(name, Call(args, kwargs, output))

        handles.append(module.register_forward_hook(note, with_kwargs=True))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


class _EnoughError(Exception):
    """Ends a forward pass of which no more is wanted."""


def entering(module: nn.Module, run: Callable[[], Any]) -> torch.Tensor:
    """The tokens that a module is called with first while something runs, which is stopped there."""
    return call_of(module, run).tokens


def call_of(module: nn.Module, run: Callable[[], Any]) -> Call:
    """What a module is called with first while something runs, which is stopped there: there is no output."""
    taken: list[Call] = []

    def stop(module, args, kwargs):
        taken.append(Call(args, kwargs, None))
        raise _EnoughError

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad(), contextlib.suppress(_EnoughError):
            run()
    finally:
        handle.remove()
    return taken[0]


def repeat(module: nn.Module, call: Call, tokens: torch.Tensor, *instead: tuple[Any, Any]) -> torch.Tensor:
    """Call a module again with other tokens and everything else as it was; its main output.

    Args:
        instead: pairs of what else it was called with, and what it is called with now.
    """
    swapped = [(call.tokens, tokens), *instead]
    exchange = lambda value: next((new for old, new in swapped if value is old), value)  # noqa: E731
    args = tuple(map(exchange, call.args))
    kwargs = {name: exchange(value) for name, value in call.kwargs.items()}
    with torch.no_grad():
        found = first_of(module(*args, **kwargs))
    if found is None:
        raise NotProvenError(f"{type(module).__name__} gave no tensor when it was run again")
    return found


def alike(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-4) -> bool:
    """Whether two tensors are equal but for rounding."""
    if found.shape != wanted.shape:
        return False
    scale = wanted.abs().max().clamp(min=1e-6)
    return ((found - wanted).abs().max() / scale).item() < tolerance
