"""Where images come from. One file each in :mod:`tosa_convert.data.readers`; ``tar:FILE`` is read by tar.py, and so on;
a path without such a beginning is a folder."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, ClassVar, NamedTuple

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
        streams: whether images come in one order only, that of :meth:`draws`.
        numbered: whether labels are numbers without names; the classes are then those up to the largest.
    """

    example: ClassVar[str]
    classes: list[str]
    ambiguous: str = ""
    streams: ClassVar[bool] = False
    numbered: bool = False

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

    def draws(self, seed: int, first: int) -> Iterator[Drawn]:
        """The images of a stream in a seeded order, again and again, from the one at ``first`` on."""
        raise NotImplementedError(f"{type(self).__name__} is no stream")


def read(source: str | Path) -> Reader:
    """The reader of a source.

    Raises:
        UsageError: see the readers.
    """
    prefix, colon, place = str(source).partition(":")
    kind = prefix if colon and prefix in discovery.names(FOLDER) and prefix != PLAIN else PLAIN
    found = discovery.module(FOLDER, kind)
    mine = next(part for part in vars(found).values() if _is_one(part) and part.__module__ == found.__name__)
    if kind != PLAIN and not place.strip(":"):
        raise UsageError(f"nothing is named behind {kind}:; write {mine.example}")
    return mine(str(source) if kind == PLAIN else place)


def _is_one(part: object) -> bool:
    return isinstance(part, type) and issubclass(part, Reader)
