"""Images with a map each, such as depth: read, cropped, turned and mirrored together."""

import math
import random
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from tosa_convert.base.errors import UsageError, gist
from tosa_convert.data.images import BEYOND, UNREADABLE, Augmentation, Images
from tosa_convert.data.reader import MapReader
from tosa_convert.models.dense import whole_image
from tosa_convert.models.preprocessing import Preprocessing

GAMMA, COLOUR = (0.9, 1.1), (0.9, 1.1)
"""Ranges of what training images are varied by; see :class:`~tosa_convert.data.reader.MapReader` for brightness."""


class DenseImages(Images):
    """The images of a source, whole, and where its reader has them their maps.

    An item is as with :class:`Images`, with a map (H, W) float32 for a label, NaN where nothing is known: for training
    of the model's own size, turned, cropped and mirrored with its image; otherwise of the size at which it is scored,
    and NaN where it is not. Without maps the label is −1.
    """

    def __init__(
        self,
        source,
        preprocessing: Preprocessing,
        augment: "str | Augmentation | None" = None,
        seed: int = 0,
    ):
        super().__init__(source, whole_image(preprocessing), augment, seed)
        # By name alone it is for images to measure on.
        self.augmentation = Augmentation(augment, degrees=0.0) if isinstance(augment, str) else augment

    @property
    def maps(self) -> str:
        """What its maps are, such as "depth"; empty where there are none."""
        return self.reader.maps if isinstance(self.reader, MapReader) else ""

    @property
    def labelled(self) -> bool:
        return bool(self.maps)

    def frame(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """What of an image of this (width, height) the model sees: left, top, right, bottom."""
        return self.reader.frame(size) if self.maps else (0, 0, *size)

    def truth(self, index: int) -> torch.Tensor | None:
        """The map of one image, (H, W), as it is; None where nothing is known of it, or it cannot be read."""
        try:
            found = self.reader.map(index)
        except UNREADABLE:
            return None
        return None if found is None else torch.from_numpy(found)

    def _image(self, index: int) -> Image.Image:
        with self.reader.open(index) as content, Image.open(content) as opened:
            return opened.convert(self.preprocessing.mode)

    def _read(self, index):
        try:
            image = self._image(index)
        except UNREADABLE:
            return None, None, self.reader.filename(index)
        mask = None
        try:
            if self.masks is not None:
                mask = self._outline(index, image.size)
            if self.maps:
                image, seen = self._framed(image, self.reader.map(index))
        except UNREADABLE as error:
            return None, None, f"{self.reader.filename(index)} ({self.maps}: {gist(error)})"
        if not self.maps:
            return self._varied(image, None, mask)[0] if self.training else self.transform(image), -1, None
        if not self.training:
            return self.transform(image), seen, None
        nothing = f"{self.reader.filename(index)} ({self.maps}: nothing is known)"
        return *self._varied(image, seen, mask), None if seen.isfinite().any() else nothing

    def _outline(self, index: int, size: tuple[int, int]) -> torch.Tensor:
        """The mask of an image of this (width, height), (H, W) in 0 to 1, as far as the model sees it."""
        left, top, right, bottom = self.frame(size)
        mask = np.asarray(self.masks.mask(self.reader.filename(index), size).convert("L"), np.float32) / 255
        return torch.from_numpy(mask[top:bottom, left:right].copy())

    def _framed(self, image: Image.Image, truth: np.ndarray | None) -> tuple[Image.Image, torch.Tensor]:
        """An image and its map as far as the model sees them, NaN where the map does not count.

        Raises:
            ValueError: the map has another size.
        """
        size = (image.height, image.width)
        truth = np.full(size, np.nan, np.float32) if truth is None else truth
        if truth.shape != size:
            (height, width), (rows, columns) = size, truth.shape
            raise ValueError(f"{rows}×{columns}, but the image is {height}×{width}")
        box = (self.reader.learnt if self.training else self.reader.scored)(image.size)
        counted = np.full_like(truth, np.nan)
        counted[box] = truth[box]
        left, top, right, bottom = self.frame(image.size)
        seen = counted[top:bottom, left:right].copy()
        return image.crop((left, top, right, bottom)), torch.from_numpy(seen)

    def seen(self, index: int) -> tuple[torch.Tensor, tuple[int, int]] | None:
        """One image as the model takes it, and its own width and height; None if it cannot be read."""
        try:
            image = self._image(index)
            return self.transform(image.crop(self.frame(image.size))), image.size
        except UNREADABLE:
            return None

    def _varied(
        self, image: Image.Image, truth: torch.Tensor | None, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | int]:
        """An image for training, with its mask as a last channel if it has one, and its map; −1 without one."""
        augment, beside = self.augmentation, [each for each in (truth, mask) if each is not None]
        pixels = tv_tensors.Image(v2.functional.to_dtype(v2.functional.pil_to_tensor(image), torch.float32, scale=True))
        pair = [pixels, *(tv_tensors.Mask(each[None]) for each in beside)]
        if augment.kind != "none":
            pair = _turned(pair, self._degrees())
            if augment.kind == "crop":
                pair = _cropped(pair, self.preprocessing.size, augment.scale)
            if random.random() < 0.5:
                pair = [v2.functional.horizontal_flip(each) for each in pair]
            if augment.photometric:
                pair[0] = self._recoloured(pair[0])
        size = list(self.preprocessing.size)
        image = self._normalised(v2.functional.resize(pair[0], size, _resampling(self.preprocessing), antialias=True))
        if mask is not None:  # nothing matters where a turned image has no pixel; what is thin stays, as a share
            mask = pair.pop().as_subclass(torch.Tensor).nan_to_num()
            mask = v2.functional.resize(mask, size, v2.InterpolationMode.BILINEAR, antialias=True)
            image = torch.cat([image, mask])
        if truth is None:
            return image, -1
        nearest = v2.functional.resize(pair[1], size, v2.InterpolationMode.NEAREST_EXACT)
        return image, nearest[0].as_subclass(torch.Tensor)

    def _degrees(self) -> float:
        asked = self.augmentation.degrees
        return getattr(self.reader, "degrees", MapReader.degrees) if asked is None else asked

    def _recoloured(self, image: torch.Tensor) -> torch.Tensor:
        """Gamma, brightness and the channels' balance, for every second image."""
        if random.random() < 0.5:
            return image
        bright = getattr(self.reader, "brightness", MapReader.brightness)
        colours = torch.tensor([random.uniform(*COLOUR) for _ in range(len(image))])[:, None, None]
        varied = image.clamp(min=0) ** random.uniform(*GAMMA) * random.uniform(*bright) * colours
        return varied.clamp(0, 1)

    def _normalised(self, image: torch.Tensor) -> torch.Tensor:
        known = self.preprocessing
        return v2.functional.normalize(image.as_subclass(torch.Tensor).clamp(0, 1), list(known.mean), list(known.std))


def _resampling(preprocessing: Preprocessing) -> v2.InterpolationMode:
    return v2.InterpolationMode(preprocessing.interpolation)


def _turned(pair: list[torch.Tensor], degrees: float) -> list[torch.Tensor]:
    """All by the same angle; where an image has no pixel its map is not known."""
    if not degrees:
        return pair
    angle = random.uniform(-degrees, degrees)
    image = v2.functional.rotate(pair[0], angle, interpolation=v2.InterpolationMode.BILINEAR)
    return [image, *(v2.functional.rotate(each, angle, fill=[math.nan]) for each in pair[1:])]


def _cropped(pair: list[torch.Tensor], size: tuple[int, int], scale: tuple[float, float]) -> list[torch.Tensor]:
    """A box of the shape of ``size``, of such a share of the area of the largest one, at a random place."""
    height, width = pair[0].shape[-2:]
    largest = min(height / size[0], width / size[1]) * math.sqrt(random.uniform(*scale))
    tall, wide = max(1, round(size[0] * largest)), max(1, round(size[1] * largest))
    top, left = random.randint(0, max(0, height - tall)), random.randint(0, max(0, width - wide))
    return [v2.functional.crop(each, top, left, tall, wide) for each in pair]


def has_maps(images: Images, kind: str, wanted: str) -> bool:
    """Whether images have maps of a kind.

    Raises:
        UsageError: they have maps of another kind.
    """
    found = getattr(images, "maps", "")
    if found not in ("", kind):
        raise UsageError(f"{images.name} has {found}, and this model gives {kind}; {wanted}")
    return found == kind


def with_channels(maps: torch.Tensor) -> torch.Tensor:
    """(B, H, W), as some models give them, or (B, K, H, W) → the latter."""
    return maps[:, None] if maps.ndim == 3 else maps


def at_truth(output: torch.Tensor, labels: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each image of a batch its map (K, H, W), resampled to the size of its truth, the truth (H, W), and where that
    is known."""
    for found, truth, (height, width) in zip(with_channels(output), labels, sizes_of(labels), strict=True):
        sized = F.interpolate(found[None].float(), size=(height, width), mode="bilinear", align_corners=False)
        truth = truth[:height, :width]
        yield sized[0], truth, truth.isfinite()


def as_large_as(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Maps (B, K, h, w) resampled to the size of labels (B, H, W)."""
    size = labels.shape[-2:]
    return output if output.shape[-2:] == size else F.interpolate(output, size=size, mode="bilinear")


def sizes_of(labels: torch.Tensor) -> list[tuple[int, int]]:
    """Height and width of each map of a batch (B, H, W), without what is beyond its edges."""
    down, across = labels[:, :, 0] != BEYOND, labels[:, 0, :] != BEYOND
    return list(zip(down.sum(1).tolist(), across.sum(1).tolist(), strict=True))
