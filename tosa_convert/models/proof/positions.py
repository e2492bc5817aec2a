"""Rotary positions that a model hands to its blocks: where they are among the arguments, and how they turn."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from tosa_convert.models.proof.calls import Call
from tosa_convert.models.proof.structure import Positions
from tosa_convert.models.rotary import turn_halves, turn_pairs

TURNS: dict[str, Callable] = {"halves": turn_halves, "pairs": turn_pairs}


def names_of(forward: Callable) -> list[str]:
    """The parameters of a method, without the module itself."""
    return [name for name in inspect.signature(forward).parameters if name != "self"]


def named(names: list[str], args: tuple, kwargs: dict) -> dict[str, Any]:
    """Arguments by the names of a method's parameters, see :func:`names_of`."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def candidates(module: nn.Module, call: Call, counts: tuple[int, ...]) -> Iterator[Positions]:
    """What among the arguments of a call could be positions: cosines and sines, or complex numbers, for each of so many
    tokens.

    Args:
        counts: of all tokens, and of those that are patches.
    """
    for name, value in named(names_of(type(module).forward), call.args, call.kwargs).items():
        tensors = _tensors(value)
        if not tensors:
            continue
        for axis in range(-min(tensors[0].ndim, 3), -1):
            if tensors[0].shape[axis] in counts:
                for turn in TURNS:
                    patches_only = tensors[0].shape[axis] < counts[0]
                    yield Positions(name=name, axis=axis, turn=turn, patches_only=patches_only)


def _tensors(value: Any) -> list[torch.Tensor]:
    """The cosines and sines that a value holds; none if it looks like something else."""
    if isinstance(value, torch.Tensor) and value.is_complex():
        return [value.real, value.imag]
    if isinstance(value, (tuple, list)) and len(value) == 2:
        first, second = value
        both = isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)
        if both and first.ndim > 1 and first.shape == second.shape and first.is_floating_point():
            return [first, second]
    return []


def read(positions: Positions, value: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, each (1 or B, 1, N, ·)."""
    first, second = (
        each.movedim(positions.axis, -2).reshape(-1, 1, each.shape[positions.axis], each.shape[-1])
        for each in _tensors(value)
    )
    return first, second


def turned(positions: Positions, heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """(B, H, N, D) queries or keys, the last of them turned where positions are known of fewer: of the patches."""
    turn = TURNS[positions.turn]
    first = heads.shape[-2] - cosines.shape[-2]
    last = turn(heads[:, :, first:], cosines, sines).to(heads.dtype)  # angles come in float32 beside half precision
    return torch.cat([heads[:, :, :first], last], dim=2) if cosines.shape[-2] != heads.shape[-2] else last


def permuted(positions: Positions, value: Any, order: torch.Tensor) -> Any:
    """The positions of tokens in another order."""
    if isinstance(value, torch.Tensor):
        return value.index_select(value.ndim + positions.axis, order)
    return type(value)(each.index_select(each.ndim + positions.axis, order) for each in value)


def len_of(positions: Positions, value: Any) -> int:
    """Of how many tokens positions are."""
    return _tensors(value)[0].shape[positions.axis]
