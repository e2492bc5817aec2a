"""Which patches of a picture attended in each selective layer, and who stood in for the others."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from tosa_convert.data import read_picture
from tosa_convert.errors import UsageError
from tosa_convert.hosts import host_of, run
from tosa_convert.origin import preprocessing_of
from tosa_convert.preprocessing import Preprocessing
from tosa_convert.selective import Selection, selective_blocks
from tosa_convert.surgery import is_converted


@dataclass(frozen=True)
class View:
    """One selective layer on one picture.

    Attributes:
        attended: (rows, columns), 1.0 where the patch ran the layer and 0.0 where it was skipped; with per-head
            selection the share of heads. Where tokens are gone for good: 1.0 for those that are still on their own.
        partners: pairs of patches, (row, column) each: the skipped one, and the one that stands in for it.
    """

    layer: int
    attended: np.ndarray
    partners: list[tuple[tuple[int, int], tuple[int, int]]]


@torch.inference_mode()
def look(model: nn.Module, images: torch.Tensor) -> list[list[View]]:
    """For each picture the views of all selective layers that skip something.

    Args:
        model: converted.
        images: (B, C, H, W), preprocessed, on the model's device.

    Raises:
        UsageError: the model is not converted.
    """
    if not is_converted(model):
        raise UsageError("this model is not converted, so it skips nothing; name a run, or say --ratio and the like")
    run(model, images)
    host = host_of(model)
    grid = host.grid(images.shape[-2:])
    everyone = torch.arange(host.prefix + grid[0] * grid[1], device=images.device).expand(len(images), -1)
    standing, views = everyone, [[] for _ in images]
    for block in selective_blocks(model):
        selection = block.selection
        if not selection.selects or selection.choice is None:
            continue
        attended, pairs = _in_the_picture(selection, standing)
        if model.tosa_config.lasting:
            fused = selection.bypass == "fuse" and selection.choice.skipped.shape[1] > 0
            nowhere = attended.new_full((len(attended), 1), -1)
            standing = torch.cat([attended, nowhere], dim=1) if fused else attended
        for index, seen in enumerate(views):
            mine = attended.reshape(len(images), -1)[index] - host.prefix
            counts = torch.bincount(mine[mine >= 0], minlength=grid[0] * grid[1])
            heads = len(attended) // len(images)
            shares = (counts / heads).reshape(grid).cpu().numpy()
            seen.append(View(selection.layer, shares, _places(pairs[index], host.prefix, grid[1])))
    return views


class Looks(NamedTuple):
    """Pictures (H, W, 3) from 0 to 1 as the model sees them, their names, and the views of each."""

    pictures: list[np.ndarray]
    names: list[str]
    views: list[list[View]]


def look_at_files(model: nn.Module, files: list[Path]) -> Looks:
    """Pictures one by one, so that a broken one is named.

    Raises:
        UsageError: a file is no picture, or the model is not converted.
    """
    preprocessing = preprocessing_of(model)
    device = next(model.parameters()).device
    images = [read_picture(path, preprocessing) for path in files]
    views = [look(model, image[None].to(device))[0] for image in images]
    return Looks([pixels(image, preprocessing) for image in images], [path.name for path in files], views)


def _in_the_picture(selection: Selection, standing: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Who attends, as positions among the tokens of the whole picture, and per picture (S, 2) skipped tokens and those
    that stand in for them. ``standing`` (B, n): the positions of the tokens that entered the layer."""
    choice = selection.choice
    if selection.per_head:
        return choice.attended, [standing.new_empty(0, 2)] * len(standing)
    attended = standing.gather(1, choice.attended)
    if choice.partners is None:
        return attended, [standing.new_empty(0, 2)] * len(standing)
    pairs = torch.stack([standing.gather(1, choice.skipped), attended.gather(1, choice.partners)], dim=-1)
    return attended, list(pairs)


def _places(pairs: torch.Tensor, prefix: int, columns: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Rows and columns of pairs of tokens that are both patches."""
    patches = (pairs[(pairs >= prefix).all(1)] - prefix).tolist()
    return [(divmod(skipped, columns), divmod(partner, columns)) for skipped, partner in patches]


def pixels(image: torch.Tensor, preprocessing: Preprocessing) -> np.ndarray:
    """A preprocessed picture (C, H, W) as one to look at, (H, W, 3) from 0 to 1."""
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    seen = (image.float().cpu() * deviation + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    return np.broadcast_to(seen, (*seen.shape[:2], 3))
