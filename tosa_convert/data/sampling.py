"""A few images to measure a model on."""

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from tosa_convert.base.errors import TosaError, TosaWarning, UsageError, some_of
from tosa_convert.base.seeding import unmoved
from tosa_convert.data.images import SCENES, Images, Pass, collate, spread
from tosa_convert.models.preprocessing import Preprocessing


def sample(
    source: str | Path | None,
    preprocessing: Preprocessing,
    count: int,
    make: Callable[..., Images] = Images,
    crops: bool = True,
) -> tuple[torch.Tensor, Images, torch.Tensor]:
    """``count`` images to measure a model on: spread evenly over a folder, or where it has fewer, seeded random
    crops of them, several of each. Of the built-in photos only the everyday scenes: figures on a brick wall or a
    deep field of stars do not carry over to other images. That a folder is taken in crops, or has broken images, is
    said. Of a stream the first ones of a seeded order, without crops.

    Args:
        crops: False takes fewer images of a source in place of crops.

    Returns:
        (B, C, H, W); the folder; and the labels, −1 where there are none.

    Raises:
        TosaError: none of them can be read.
    """
    images = make(source, preprocessing)
    items = _sampled(source, images, make, count, crops)
    batch = collate([item for item in items if item[0] is not None])
    broken = list(dict.fromkeys(name for *_, name in items if name))
    if not len(batch["images"]):
        raise TosaError(f"none of the images in {images.name} can be read")
    if broken:
        warnings.warn(
            f"{len(broken)} broken image{'s' if len(broken) > 1 else ''} of {images.name} left out: {some_of(broken)}",
            TosaWarning,
            stacklevel=3,
        )
    return batch["images"], images, batch["labels"]


def _sampled(
    source: str | Path | None, images: Images, make: Callable[..., Images], count: int, crops: bool
) -> list[tuple]:
    if images.reader.streams:
        return list(itertools.islice(Pass(images, seed=0), count))
    if not crops and source is not None:
        count = min(count, len(images))
    if len(images) >= count and source is not None:
        return [images[index] for index in spread(len(images), count)]
    return _cropped(source, make(source, images.preprocessing, augment="crop"), count)


def _cropped(source: str | Path | None, images: Images, count: int) -> list[tuple]:
    """Crops, without another image in the place of a broken one."""
    places = [
        place
        for place in range(len(images))
        if source is not None or Path(images.reader.filename(place)).stem in SCENES
    ]
    with unmoved():
        drawn = [images[draw, places[draw % len(places)]] for draw in range(count)]
    if source is not None:
        warnings.warn(
            f"{images.name} has fewer than {count} images, {len(places)}: random crops of them are looked at",
            TosaWarning,
            stacklevel=4,
        )
    return [item if item[2] is None else (None, *item[1:]) for item in drawn]


def check_batch(images: torch.Tensor, preprocessing: Preprocessing) -> None:
    """
    Raises:
        UsageError: these are no preprocessed images of a model.
    """
    if not isinstance(images, torch.Tensor):
        raise UsageError(f"images are a {type(images).__name__}; give a tensor (B, C, H, W), preprocessed")
    if images.ndim != 4 or not len(images) or images.shape[1] != preprocessing.channels:
        raise UsageError(
            f"images of shape {tuple(images.shape)} are not a batch of images of this model; give (B, "
            f"{preprocessing.channels}, H, W)"
        )
    if not images.is_floating_point():
        raise UsageError(f"images are {images.dtype}; give preprocessed ones, in floating point")
    if not images.isfinite().all():
        raise UsageError("images hold values that are not finite, nan or inf; give preprocessed ones")
