"""Find the row of blocks in a model by what they do: equal modules, one after the other, on tokens of one shape."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from tosa_convert.models.proof.calls import (
    Call,
    NotProvenError,
    alike,
    call_of,
    entering,
    is_tokens,
    record,
    repeat,
)

CUTTING = (nn.Conv2d, nn.Conv3d, nn.Linear)
"""What may give the patches."""


class Row(NamedTuple):
    """A row of blocks that ran.

    Attributes:
        name: of the row in the model.
        blocks: those that run on the same tokens, from the first on.
        calls: of each of them.
        projection: name of the module that gives the patches.
        grid: rows and columns of the patches; of a video's, times before them.
        prefix, suffix: tokens before and after the patches.
    """

    name: str
    blocks: list[nn.Module]
    calls: list[Call]
    projection: str
    grid: tuple[int, ...]
    prefix: int
    suffix: int


def find_row(
    model: nn.Module, run: Callable[[torch.Tensor], object], image: torch.Tensor, grid: tuple[int, ...]
) -> Row:
    """The row that an image runs through.

    Args:
        run: runs the model on an image.
        image: (1, C, H, W), or a video, (1, T, C, H, W).
        grid: rows and columns by the model's own word; asked where no convolution tells them.

    Raises:
        NotProvenError: there is none, or there are several, or its tokens are not patches on a grid.
    """
    lists = _lists(model)
    members = {f"{name}.{index}": block for name, row in lists.items() for index, block in enumerate(row)}
    cutting = {name: part for name, part in model.named_modules() if isinstance(part, CUTTING)}
    calls = record({**members, **cutting}, lambda: run(image))
    found: dict[str, list[nn.Module]] = {}
    for name, row in lists.items():
        inside = any(name.startswith(f"{outer}.") for outer in found)  # a part of the blocks of another row
        if not inside and _runs_on_tokens(name, row, calls):
            found[name] = row
    if not found:
        raise NotProvenError(
            f"{type(model).__name__} has no row of equal blocks that take tokens (B, N, C) and give as many"
        )
    projection, grid = _patches(cutting, calls, grid, type(model).__name__)
    name, blocks = _the_one(found, calls, grid, projection, type(model).__name__)
    first = calls[f"{name}.0"]
    count = first.tokens.shape[1]
    same = [index for index in range(len(blocks)) if calls[f"{name}.{index}"].tokens.shape[1] == count]
    layers = next((index for index in range(len(blocks)) if index not in same), len(blocks))
    prefix = _prefix(blocks[0], run, image, grid, type(model).__name__)
    mine = [calls[f"{name}.{index}"] for index in range(layers)]
    return Row(name, blocks[:layers], mine, projection, grid, prefix, count - prefix - math.prod(grid))


def _the_one(found: dict[str, list[nn.Module]], calls: dict[str, Call], grid: tuple, projection: str, model: str):
    """The row whose tokens hold all patches."""
    counts = {name: calls[f"{name}.0"].tokens.shape[1] for name in found}
    whole = {name: row for name, row in found.items() if counts[name] >= math.prod(grid)}
    if not whole:
        raise NotProvenError(
            f"the grid of {'×'.join(map(str, grid))} patches that {model}'s {projection} gives is not filled by the "
            f"{max(counts.values())} tokens of its blocks: patches are pooled, dropped, or run in windows or picture "
            "by picture"
        )
    if len(whole) > 1:
        raise NotProvenError(
            f"{model} has {len(whole)} rows of blocks over tokens, {', '.join(whole)}; convert the part with the one "
            "that you mean"
        )
    return next(iter(whole.items()))


def check_batches(block: nn.Module, alone: Call, run_two: Callable[[], object], model: str) -> None:
    """That an image's tokens come out the same beside those of another one.

    Raises:
        NotProvenError: they do not.
    """
    both = call_of(block, run_two)
    if len(both.tokens) != 2:
        raise NotProvenError(f"{model} packs the tokens of a batch of images into rows of its own")
    if not alike(repeat(block, both, both.tokens)[:1], alone.result):
        raise NotProvenError(f"{model}'s {type(block).__name__} mixes the images of a batch")


def _lists(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Rows of at least two modules of one class, outermost first."""
    found: dict[str, list[nn.Module]] = {}
    for name, part in model.named_modules():
        if not isinstance(part, (nn.ModuleList, nn.Sequential)):
            continue
        blocks = list(part)
        if len(blocks) > 1 and len({type(block) for block in blocks}) == 1 and list(blocks[0].children()):
            found[name] = blocks
    return found


def _runs_on_tokens(name: str, row: list[nn.Module], calls: dict[str, Call]) -> bool:
    mine = [calls.get(f"{name}.{index}") for index in range(len(row))]
    return all(
        call is not None
        and call.tokens is not None
        and is_tokens(call.result)
        and call.result.shape == call.tokens.shape
        for call in mine
    )


def _patches(cutting: dict, calls: dict[str, Call], grid: tuple[int, ...], model: str) -> tuple[str, tuple[int, ...]]:
    """The convolution that cuts the image into patches, or what projects patches that are cut already, and their
    grid."""
    for name in cutting:
        if name in calls and calls[name].result.ndim >= 4 and not isinstance(cutting[name], nn.Linear):
            return name, tuple(calls[name].result.shape[2:])
    for name, call in calls.items():
        if name in cutting and call.result.ndim == 3 and call.result.shape[1] == math.prod(grid):
            return name, grid
    raise NotProvenError(f"{model} has no convolution or projection that makes patches of its images")


@torch.no_grad()
def _prefix(block: nn.Module, run: Callable, image: torch.Tensor, grid: tuple[int, ...], model: str) -> int:
    """At which token the patches begin; that they follow in reading order is looked at in three places."""
    before = entering(block, lambda: run(image))
    begins = set()
    for cell in ([0] * len(grid), [side // (2 + axis) for axis, side in enumerate(grid)], [side - 1 for side in grid]):
        after = entering(block, lambda cell=cell: run(_changed(image, grid, cell)))
        place = (after - before).norm(dim=-1)[0].argmax().item()
        begins.add(place - sum(at * math.prod(grid[axis + 1 :]) for axis, at in enumerate(cell)))
    prefix = begins.pop()
    if begins or prefix < 0:
        raise NotProvenError(f"the tokens of {model}'s blocks are not its patches in reading order")
    return prefix


def _changed(image: torch.Tensor, grid: tuple[int, ...], cell: list[int]) -> torch.Tensor:
    """An image (1, C, H, W) or a video (1, T, C, H, W) that differs in the middle of one patch."""
    changed = image.clone()
    middle = changed
    for axis, count, at in zip((-4, -2, -1)[-len(grid) :], grid, cell, strict=True):
        side = image.shape[axis] // count
        middle = middle.narrow(axis, at * side + side // 2 - side // 4, 2 * (side // 4) + 1)
    middle += 3.0
    return changed
