"""Images → batches, through timm's transforms; broken images are left out and reported."""

import io
import math
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torchvision import transforms

from tosa_convert.base.errors import TosaError, UsageError, gist
from tosa_convert.base.seeding import as_seed, random_state, seed_transforms, set_random_state, unmoved
from tosa_convert.data.masks import Masks
from tosa_convert.data.reader import Drawn, read
from tosa_convert.models.preprocessing import Preprocessing

BUILT_IN = "built-in photos"
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
MOST_BROKEN = 1000  # images in a row of a stream that may not be readable
SCENES = ("astronaut", "camera", "chelsea", "coffee", "rocket")  # the everyday ones among them
BEYOND = -math.inf  # in a batch of maps of different sizes: beyond an image's own edges


def built_in_photos() -> Path:
    """The folder of public-domain photos that travels with the package."""
    return Path(str(files("tosa_convert") / "assets" / "photos"))


def built_in_scenes() -> list[Path]:
    """The everyday photos among them."""
    return [path for path in sorted(built_in_photos().iterdir()) if path.stem in SCENES]


class Augmentation(NamedTuple):
    """What training images go through.

    Attributes:
        kind: "crop" (random resized crop and mirror), "flip" (mirror only) or "none".
        scale: least and largest share of the area of a crop.
        aa: timm's string for AutoAugment and the like, applied to crops.
        reprob: probability that a part of a crop is erased.
        photometric: whether images with maps vary in gamma, brightness and colour.
        degrees: by how much these are turned at most; None for what suits their source.
    """

    kind: str
    scale: tuple[float, float] = (0.5, 1.0)
    aa: str | None = None
    reprob: float = 0.0
    photometric: bool = False
    degrees: float | None = None


def check_augmentation(augmentation: Augmentation) -> None:
    """
    Raises:
        UsageError: timm does not understand its string.
    """
    try:
        for part in (augmentation.aa or "").split("-")[1:]:
            if not part.startswith("t") and not any(map(str.isdigit, part)):  # timm passes over it
                raise ValueError(f"{part} has no number")
        create_transform(32, is_training=True, auto_augment=augmentation.aa)
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise UsageError(
            f"aa {augmentation.aa!r} is not understood by timm ({gist(error)}); write it such as rand-m9-mstd0.5-inc1"
        ) from None


class Images(Dataset):
    """The images of a source: a folder, a tar file, shards, a dataset, see :mod:`tosa_convert.data.readers`.

    An item is (image (C, H, W) float32, label, None), or (None, None, name) for an image that
    cannot be read. With ``augment`` the images are for training: an item is indexed by a draw (see
    :class:`Draws`), which seeds its random transform, and a broken image is replaced by the next
    good one.
    """

    def __init__(
        self,
        source: str | Path | None,
        preprocessing: Preprocessing,
        augment: "str | Augmentation | None" = None,
        seed: int = 0,
    ):
        self.name = BUILT_IN if source is None else str(source)
        self.reader = read(built_in_photos() if source is None else source)
        self.preprocessing, self.training, self.seed = preprocessing, augment is not None, seed
        augment = Augmentation(augment) if isinstance(augment, str) else augment
        self.transform = _transform(preprocessing, augment)
        self.masks: Masks | None = None  # each image then brings its own as a last channel
        self.outputs: int | None = None  # of the model, if labels count; of a stream they show only as it comes

    @property
    def labelled(self) -> bool:
        return bool(self.classes)

    @property
    def ambiguous(self) -> str:
        """What makes the labels ambiguous, if anything does."""
        return self.reader.ambiguous

    @property
    def classes(self) -> list[str]:
        """Names of the classes in the order of the labels; empty where there are no labels."""
        return self.reader.classes

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, draw: "int | tuple[int, int]"):
        if not self.training:
            return self._read(draw)
        position, index = draw
        seed_transforms(self.seed + 1_000_003 * (position + 1))
        noted = None
        for offset in range(len(self)):
            image, label, broken = self._read((index + offset) % len(self))
            noted = noted or broken
            if image is not None:
                return image, label, noted
        raise TosaError(f"none of the images in {self.name} can be read; the last one was {broken}")

    def label(self, index: int) -> int | torch.Tensor:
        """That of one image; −1 where there are none."""
        return self.reader.label(index) if self.labelled else -1

    def check_label(self, drawn: Drawn) -> None:
        """
        Raises:
            UsageError: the image of a stream has no label, or one beyond the model's outputs, where these are known.
        """
        if self.outputs is None:
            return
        if drawn.label < 0:
            raise UsageError(f"{drawn.name} has no label; set labels to 0, or leave it out")
        if drawn.label >= self.outputs:
            raise UsageError(
                f"{drawn.name} has label {drawn.label}, and the model has {self.outputs} outputs: labels count from 0; "
                "give another --num-classes, or set labels to 0"
            )

    def _read(self, index: int):
        try:
            content = self.reader.open(index)
            state = None if self.masks is None else random_state()
            image = self.decoded(content)
        except UNREADABLE:
            return None, None, self.reader.filename(index)
        if state is not None:
            image = torch.cat([image, self._mask(index, state)])
        return image, self.label(index), None

    def size_of(self, index: int) -> tuple[int, int]:
        """(width, height) of an image file."""
        with self.reader.open(index) as content, Image.open(content) as opened:
            return opened.size

    def _mask(self, index: int, state: tuple) -> torch.Tensor:
        """(1, H, W) in 0 to 1: the mask of an image, cropped and mirrored as the image was."""
        mask = self.masks.mask(self.reader.filename(index), self.size_of(index)).convert(self.preprocessing.mode)
        with unmoved():
            set_random_state(state)
            seen = self.transform(mask)[:1]
        return seen * self.preprocessing.std[0] + self.preprocessing.mean[0]

    def decoded(self, content: BinaryIO) -> torch.Tensor:
        """The bytes of an image → (C, H, W), as the model takes it."""
        with content, Image.open(content) as opened:
            return self.transform(opened.convert(self.preprocessing.mode))


class _Stream(IterableDataset):
    """The draws [first, last) of a stream of training images. In the place of one that cannot be read comes the next
    good one, as with :class:`Images`, so that what is drawn depends on the place in the stream alone."""

    def __init__(self, images: Images, first: int, last: int, repeats: int):
        self.images, self.first, self.last, self.repeats = images, first, last, repeats

    def __iter__(self):
        images, broken = self.images, []
        begun = self.first // self.repeats
        for place, drawn in enumerate(images.reader.draws(images.seed, begun), start=begun):
            images.check_label(drawn)
            content = drawn.content.read()
            for position in range(place * self.repeats, (place + 1) * self.repeats):
                try:
                    for at, name in [*broken, (position, None)]:
                        if self.first <= at < self.last:
                            seed_transforms(images.seed + 1_000_003 * (at + 1))
                            yield images.decoded(io.BytesIO(content)), drawn.label, name
                    broken = []
                except UNREADABLE:
                    broken.append((position, drawn.name))
            if len(broken) > MOST_BROKEN:
                raise TosaError(f"none of {MOST_BROKEN} images in a row of {images.name} can be read")
            if (place + 1) * self.repeats >= self.last and not broken:
                return


class Pass(IterableDataset):
    """The images of a stream once, in the form of those of :class:`Images`.

    Args:
        seed: of their order; None takes them as they come.
    """

    def __init__(self, images: Images, seed: int | None = None):
        self.images, self.seed = images, seed

    def __iter__(self):
        images = self.images
        for drawn in images.reader.once(self.seed):
            images.check_label(drawn)
            try:
                yield images.decoded(drawn.content), drawn.label, None
            except UNREADABLE:
                yield None, None, drawn.name


def _transform(preprocessing: Preprocessing, augment: Augmentation | None) -> transforms.Compose:
    cropped = augment is not None and augment.kind == "crop"
    asked = augment._asdict() if cropped else {}
    transform = create_transform(
        (preprocessing.channels, *preprocessing.size),
        is_training=cropped,
        mean=preprocessing.mean,
        std=preprocessing.std,
        interpolation=preprocessing.interpolation,
        crop_pct=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
        color_jitter=0.0,
        scale=asked.get("scale"),
        auto_augment=asked.get("aa"),
        re_prob=asked.get("reprob", 0.0),
        re_mode="pixel",
    )
    flipped = augment is not None and augment.kind == "flip"
    return transforms.Compose([transforms.RandomHorizontalFlip(), transform]) if flipped else transform


def read_image(file: Path, preprocessing: Preprocessing) -> torch.Tensor:
    """One image as the model takes it, (C, H, W).

    Raises:
        UsageError: it is missing, or not an image.
    """
    try:
        with Image.open(file) as opened:
            return _transform(preprocessing, None)(opened.convert(preprocessing.mode))
    except UNREADABLE as error:
        raise UsageError(f"cannot read {file}: {_unread(error)}; give an image such as a .jpg or .png file") from None


def _unread(error: Exception) -> str:
    return getattr(error, "strerror", None) or "it is not an image, or is damaged"


def spread(length: int, count: int) -> list[int]:
    """Up to ``count`` of so many places, as far from each other as possible, so that every class is seen."""
    return [place * length // count for place in range(count)] if count < length else list(range(length))


class Draws(Sampler):
    """An endless, seeded shuffle cut to positions [first, last), so that a resumed training sees what comes next.

    Yields (position, index); each pass over the data is its own permutation. With ``repeats`` each index comes so often
    in a row, and a pass, which is as long, holds fewer of them.
    """

    def __init__(self, length: int, first: int, last: int, seed: int, repeats: int = 1):
        self.length, self.first, self.last, self.seed, self.repeats = length, first, last, seed, repeats

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for position in range(self.first, self.last):
            epoch, place = divmod(position, self.length)
            if place == 0 or position == self.first:
                generator = torch.Generator().manual_seed(as_seed(self.seed + epoch))
                order = torch.randperm(self.length, generator=generator).tolist()
            yield position, order[place // self.repeats]


def collate(items: list) -> dict:
    """{"images": (B, C, H, W), "labels": (B,), "broken": names, "read": whether each is in the tensors}."""
    good = [(image, label) for image, label, _ in items if image is not None]
    return {
        "images": torch.stack([image for image, _ in good]) if good else torch.empty(0),
        "labels": stacked([label for _, label in good]),
        "broken": [name for *_, name in items if name],
        "read": [image is not None for image, *_ in items],
    }


def stacked(labels: list[int | torch.Tensor]) -> torch.Tensor:
    """Those of a batch: (B,) of numbers, (B, …) of tensors; maps of different sizes are filled up to the largest with
    :data:`BEYOND`."""
    if not labels:
        return torch.empty(0, dtype=torch.long)
    each = [torch.as_tensor(label) for label in labels]
    sizes = torch.tensor([label.shape for label in each])
    if each[0].ndim == 2 and (sizes != sizes[0]).any():
        down, across = sizes.amax(0).tolist()
        each = [F.pad(one, (0, across - one.shape[1], 0, down - one.shape[0]), value=BEYOND) for one in each]
    return torch.stack(each)


def training_loader(
    images: Images, batch_size: int, first: int, last: int, workers: int, repeats: int = 1
) -> DataLoader:
    """Batches of the draws [first, last), the same ones however often training was interrupted."""
    if images.reader.streams:
        return DataLoader(_Stream(images, first, last, repeats), batch_size, collate_fn=collate)
    draws = Draws(len(images), first, last, images.seed, repeats)
    return DataLoader(images, batch_size, sampler=draws, num_workers=workers, collate_fn=collate)


def loader(images: Images, batch_size: int, workers: int = 0) -> DataLoader:
    """Batches of every image once, in order."""
    if isinstance(images, Images) and images.reader.streams:
        return DataLoader(Pass(images), batch_size, collate_fn=collate)
    return DataLoader(images, batch_size, num_workers=workers, collate_fn=collate)
