"""Find the row of blocks in a model by what they do: equal modules, one after the other, on tokens of one shape."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from tosa_convert.models.proof.calls import Call, NotProvenError, entering, is_tokens, record


class Row(NamedTuple):
    """A row of blocks that ran.

    Attributes:
        name: of the row in the model.
        blocks: those that run on the same tokens, from the first on.
        first: the call of the first of them.
        projection: name of the module that gives the patches.
        grid: rows and columns of the patches.
        prefix, suffix: tokens before and after the patches.
    """

    name: str
    blocks: list[nn.Module]
    first: Call
    projection: str
    grid: tuple[int, int]
    prefix: int
    suffix: int


def find_row(model: nn.Module, run: Callable[[torch.Tensor], object], image: torch.Tensor) -> Row:
    """The row that an image runs through.

    Args:
        run: runs the model on an image.
        image: (1, C, H, W).

    Raises:
        NotProvenError: there is none, or there are several, or its tokens are not patches on a grid.
    """
    lists = _lists(model)
    members = {f"{name}.{index}": block for name, row in lists.items() for index, block in enumerate(row)}
    convolutions = {name: part for name, part in model.named_modules() if isinstance(part, nn.Conv2d)}
    calls = record({**members, **convolutions}, lambda: run(image))
    found: dict[str, list[nn.Module]] = {}
    for name, row in lists.items():
        inside = any(name.startswith(f"{outer}.") for outer in found)  # a part of the blocks of another row
        if not inside and _runs_on_tokens(name, row, calls):
            found[name] = row
    if not found:
        raise NotProvenError(
            f"{type(model).__name__} has no row of equal blocks that take tokens (B, N, C) and give as many"
        )
    if len(found) > 1:
        raise NotProvenError(
            f"{type(model).__name__} has {len(found)} rows of blocks over tokens, {', '.join(found)}; convert the part "
            "with the one that you mean"
        )
    name, blocks = next(iter(found.items()))
    first = calls[f"{name}.0"]
    count = first.tokens.shape[1]
    same = [index for index in range(len(blocks)) if calls[f"{name}.{index}"].tokens.shape[1] == count]
    layers = next((index for index in range(len(blocks)) if index not in same), len(blocks))
    projection, grid = _patches(convolutions, calls, count, type(model).__name__)
    prefix = _prefix(blocks[0], run, image, grid, type(model).__name__)
    return Row(name, blocks[:layers], first, projection, grid, prefix, count - prefix - grid[0] * grid[1])


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


def _patches(convolutions: dict, calls: dict[str, Call], count: int, model: str) -> tuple[str, tuple[int, int]]:
    """The convolution that cuts the image into patches, and their grid."""
    for name in convolutions:
        if name in calls and calls[name].result.ndim == 4:
            rows, columns = calls[name].result.shape[-2:]
            if rows * columns <= count:
                return name, (rows, columns)
            raise NotProvenError(
                f"the grid of {rows}×{columns} patches that {model}'s {name} gives is not filled by the {count} tokens "
                "of its blocks: patches are pooled, dropped or run in windows"
            )
    raise NotProvenError(f"{model} has no convolution that cuts its images into patches")


@torch.no_grad()
def _prefix(block: nn.Module, run: Callable, image: torch.Tensor, grid: tuple[int, int], model: str) -> int:
    """At which token the patches begin; that they follow in reading order is looked at in three places."""
    rows, columns = grid
    height, width = (side // count for side, count in zip(image.shape[-2:], grid, strict=True))
    before = entering(block, lambda: run(image))
    places = {}
    for row, column in ((0, 0), (rows // 2, columns // 3), (rows - 1, columns - 1)):
        changed = image.clone()
        y, x = row * height + height // 2, column * width + width // 2
        changed[..., y - height // 4 : y + height // 4 + 1, x - width // 4 : x + width // 4 + 1] += 3.0
        after = entering(block, lambda changed=changed: run(changed))
        places[row * columns + column] = (after - before).norm(dim=-1)[0].argmax().item()
    prefixes = {place - index for index, place in places.items()}
    prefix = prefixes.pop()
    if prefixes or prefix < 0:
        raise NotProvenError(f"the tokens of {model}'s blocks are not its patches in reading order")
    return prefix
