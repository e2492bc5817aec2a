"""Where images come from. One file each in :mod:`tosa_convert.data.readers`; ``tar:FILE`` is read by tar.py, and so on;
a path without such a beginning is a folder."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, BinaryIO, ClassVar, NamedTuple
from urllib.parse import parse_qsl, urlencode

import numpy as np

from tosa_convert.base import discovery
from tosa_convert.base.errors import UsageError

FOLDER = "data/readers"
PLAIN = "folder"


class Drawn(NamedTuple):
    """An image of a stream: its bytes, the number of its class (−1 without one), and what messages call it."""

    content: BinaryIO
    label: int
    name: str


class Reader(ABC):
    """Images in an order of their own, any of which can be read at any time, from several processes, if they are not a
    stream.

    Attributes:
        example: how such a source is written.
        classes: names of the classes in the order of the labels; empty where there are no labels.
        ambiguous: what makes the labels ambiguous, if anything does.
        remedy: what to do about that.
        streams: whether images come in one order only, that of :meth:`draws`.
        stored: of a stream, the source of the same images that is none.
        numbered: whether labels are numbers without names; the classes are then those up to the largest.
        takes: what may be given beside the place, such as "list"; the argument of the same name.
    """

    example: ClassVar[str]
    classes: list[str]
    ambiguous: str = ""
    remedy: str = "give images that are sorted by classes, and nothing else"
    streams: ClassVar[bool] = False
    stored: str = ""
    numbered: bool = False
    takes: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def __init__(self, place: str):
        """
        Raises:
            UsageError: there are no images in this place, or they cannot be read.
        """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def open(self, index: int) -> BinaryIO:
        """The bytes of an image file."""

    @abstractmethod
    def label(self, index: int) -> int:
        """The number of its class, where there are classes."""

    @abstractmethod
    def filename(self, index: int) -> str:
        """What messages call it."""

    def label_all(self, labels: Sequence[int | None], names: Sequence[str] = ()) -> None:
        """What follows for the classes from the labels of all images, None where one has none.

        Args:
            names: of the classes; none where labels are numbers without.
        """
        known = [label for label in labels if label is not None]
        self.numbered = bool(known) and not names
        self.classes = list(names) if known and names else [str(each) for each in range(1 + max(known, default=-1))]
        if 0 < len(known) < len(labels):
            odd = next(index for index, label in enumerate(labels) if label is None)
            self.classes, self.ambiguous = [], f"{self.filename(odd)} has no label, unlike others"

    def check_stored(self) -> None:
        """
        Raises:
            UsageError: it is a stream, whose images cannot be had by their number.
        """
        if self.streams:
            raise UsageError(f"this takes images by their number, which a stream has not; use {self.stored}")

    def draws(self, seed: int, first: int) -> Iterator[Drawn]:
        """The images of a stream in a seeded order, again and again, from the one at ``first`` on."""
        raise NotImplementedError(f"{type(self).__name__} is no stream")

    def once(self, seed: int | None = None) -> Iterator[Drawn]:
        """One pass over a stream: in a seeded order, or as it comes."""
        raise NotImplementedError(f"{type(self).__name__} is no stream")


def unclear(folders: set[PurePath]) -> str:
    """What makes labels ambiguous that are the names of the folders with images, if anything does."""
    if len(folders) < 2:
        return ""
    if PurePath() in folders:
        return "there are images next to the class folders"
    twice = len({folder.name for folder in folders}) < len(folders)
    return "two folders have the same name, as in train/ and val/ side by side" if twice else ""


class MapReader(Reader):
    """Images with a map each: for every pixel a number.

    Attributes:
        maps: what they are, such as "depth"; it is that of a task.
        degrees: by how much training images are turned at most.
        brightness: least and largest factor of that of training images.
    """

    maps: ClassVar[str]
    degrees: ClassVar[float] = 0.0
    brightness: ClassVar[tuple[float, float]] = (0.9, 1.1)
    classes: ClassVar[list[str]] = []

    @abstractmethod
    def map(self, index: int) -> np.ndarray | None:
        """(H, W) float32, NaN where nothing is known; None where nothing is known of the whole image."""

    def frame(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """What of an image of this (width, height) the model sees: left, top, right, bottom.

        Raises:
            ValueError: images of this size are not of this source.
        """
        return (0, 0, *size)

    def scored(self, size: tuple[int, int]) -> tuple[slice, slice]:
        """Where in an image of this (width, height) its map is scored: rows, columns."""
        return slice(None), slice(None)

    def learnt(self, size: tuple[int, int]) -> tuple[slice, slice]:
        """Where in a training image of this (width, height) its map counts: rows, columns."""
        return slice(None), slice(None)

    def label(self, index: int) -> int:
        return -1


def with_options(source: str | None, **options: Any) -> str | None:
    """A source with what is given beside it, as ``nyu:ROOT?list=FILE``: the form in which both go on together.

    Raises:
        UsageError: the source takes none of the kind.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if not given:
        return source
    kind = str(source).partition(":")[0]
    taken = _takes(kind)
    for name in given:
        if name not in taken:
            raise UsageError(
                f"{SPELT.get(name, name)} goes with sources of maps that take it, such as "
                f"{', '.join(f'{each}:ROOT' for each in discovery.names(FOLDER) if name in _takes(each))}; leave it out"
            )
    root, _, before = str(source).partition("?")
    return f"{root}?{urlencode(dict(parse_qsl(before)) | given, safe='/:')}"


def takes(source: str | None, name: str) -> bool:
    """Whether a source takes something of this name beside it."""
    return name in _takes(str(source).partition(":")[0])


SPELT = {"list": "--list", "scale": "--depth-scale"}


def _takes(kind: str) -> tuple[str, ...]:
    return _reader(kind).takes if kind in discovery.names(FOLDER) else ()


def _reader(kind: str) -> type[Reader]:
    found = discovery.module(FOLDER, kind)
    return next(part for part in vars(found).values() if _is_one(part) and part.__module__ == found.__name__)


def read(source: str | Path) -> Reader:
    """The reader of a source.

    Raises:
        UsageError: see the readers.
    """
    if not isinstance(source, (str, Path)):
        raise UsageError(f"images are named here, by a folder or another source, and this is a {type(source).__name__}")
    prefix, colon, place = str(source).partition(":")
    kind = prefix if colon and prefix in discovery.names(FOLDER) and prefix != PLAIN else PLAIN
    mine = _reader(kind)
    if kind != PLAIN and not place.strip(":"):
        raise UsageError(f"nothing is named behind {kind}:; write {mine.example}")
    if not mine.takes:
        return mine(str(source) if kind == PLAIN else place)
    root, _, beside = place.partition("?")
    options = dict(parse_qsl(beside))
    odd = next((name for name in options if name not in mine.takes), None)
    if odd is not None:
        raise UsageError(f"{kind}: takes no {odd!r}; write {mine.example}")
    return mine(root, **options)


def _is_one(part: object) -> bool:
    return isinstance(part, type) and issubclass(part, Reader)
