"""Which patches of an image attended in each selective layer, and which of them represented the others."""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from tosa_convert.base.errors import UsageError
from tosa_convert.data.images import read_image
from tosa_convert.methods.token_ops import Choice
from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.models.preprocessing import Preprocessing
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.reporting.map_panels import Panel, map_panels
from tosa_convert.selective.conversion import is_converted, original
from tosa_convert.selective.selection import Selection, keeps_any_number, selective_blocks
from tosa_convert.tasks.task import task_of


@dataclass(frozen=True)
class View:
    """One selective layer on one image.

    Attributes:
        attended: (rows, columns), 1.0 where the patch ran the layer and 0.0 where it was skipped; with per-head
            selection the share of heads, of a video the share of times. Where tokens are removed: 1.0 for those that
            are left and not merged.
        partners: pairs of patches, (row, column) each: the skipped one, and the one that represents it.
    """

    layer: int
    attended: np.ndarray
    partners: list[tuple[tuple[int, int], tuple[int, int]]]


@torch.no_grad()
def look(model: nn.Module, images: torch.Tensor) -> list[list[View]]:
    """For each image the views of all selective layers that skip tokens.

    Args:
        model: converted.
        images: (B, C, H, W), preprocessed, on the model's device.

    Raises:
        UsageError: the model is not converted.
    """
    if not is_converted(model):
        raise UsageError(
            "this model is not converted, so it skips no tokens; name a run that is, or give --ratio and so on"
        )
    if len(images) > 1 and keeps_any_number(model):
        return [views for image in images for views in look(model, image[None])]
    run(model, images)
    adapter = adapter_of(model)
    grid = adapter.grid(images.shape[-2:])
    everyone = torch.arange(adapter.prefix + prod(grid), device=images.device).expand(len(images), -1)
    standing, views = everyone, [[] for _ in images]
    for block in selective_blocks(model):
        selection = block.selection
        if not selection.selects:
            continue
        state = selection.current.state
        attended, pairs = _in_the_image(selection, state.choices[selection.layer], standing)
        if model.tosa_config.reduces:
            groups = state.groups[selection.layer]
            made = 0 if groups is None else groups.sizes.shape[1] - attended.shape[1]  # fused tokens are at no patch
            standing = torch.cat([attended, attended.new_full((len(attended), made), -1)], dim=1)
        for index, seen in enumerate(views):
            mine = attended.reshape(len(images), -1)[index] - adapter.prefix
            counts = torch.bincount(mine[mine >= 0], minlength=prod(grid))
            heads = len(attended) // len(images)
            shares = (counts / heads).reshape(-1, *grid[-2:]).mean(0).cpu().numpy()
            seen.append(View(selection.layer, shares, _places(pairs[index], adapter.prefix, grid)))
    return views


class Looks(NamedTuple):
    """Images (H, W, 3) in [0, 1] as the model sees them, their names, the views of each, and of models that give maps
    the panels of each."""

    images: list[np.ndarray]
    names: list[str]
    views: list[list[View]]
    maps: list[list[Panel]]


def look_at_files(model: nn.Module, files: list[Path], before: nn.Module | None = None) -> Looks:
    """Images one by one, so that a broken one is named.

    Args:
        before: the original, for its maps; None for that with the weights of this model. A model that gives maps and is
            not converted is shown with its own.

    Raises:
        UsageError: a file is not an image, or the model is not converted.
    """
    preprocessing = preprocessing_of(model)
    device = next(model.parameters()).device
    images = [read_image(path, preprocessing) for path in files]
    dense, plain = bool(task_of(model).differences), not is_converted(model)
    views = [[] if dense and plain else look(model, image[None].to(device))[0] for image in images]
    maps = []
    if dense:
        before = None if plain else original(model) if before is None else before.to(device)
        maps = map_panels(model, before, torch.stack(images).to(device))
    return Looks([pixels(image, preprocessing) for image in images], [path.name for path in files], views, maps)


def _in_the_image(
    selection: Selection, choice: Choice, standing: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Which tokens attend, as positions in the whole image, and per image (S, 2) skipped tokens and those that
    represent them. ``standing`` (B, n): the positions of the tokens that entered the layer."""
    if selection.per_head:
        return choice.attended, [standing.new_empty(0, 2)] * len(standing)
    attended = standing.gather(1, choice.attended)
    if choice.partners is None:
        return attended, [standing.new_empty(0, 2)] * len(standing)
    pairs = torch.stack([standing.gather(1, choice.skipped), attended.gather(1, choice.partners)], dim=-1)
    return attended, list(pairs)


def _places(pairs: torch.Tensor, prefix: int, grid: tuple[int, ...]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Rows and columns of pairs of tokens that are both patches."""
    patches = ((pairs[(pairs >= prefix).all(1)] - prefix) % prod(grid[-2:])).tolist()
    return [(divmod(skipped, grid[-1]), divmod(partner, grid[-1])) for skipped, partner in patches]


def pixels(image: torch.Tensor, preprocessing: Preprocessing) -> np.ndarray:
    """A preprocessed image (C, H, W) as one to display, (H, W, 3) in [0, 1]."""
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    seen = (image.float().cpu() * deviation + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    return np.broadcast_to(seen, (*seen.shape[:2], 3))
