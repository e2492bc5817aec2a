"""Lists of images with their depth, as BTS (arXiv 1907.10326) and NeWCRFs prepare NYU Depth v2 and KITTI: a line each
of ``image depth focal``, by paths from a root."""

from pathlib import Path

import numpy as np

from tosa_convert.base.errors import UsageError
from tosa_convert.data.maps import listed, png_of
from tosa_convert.data.reader import MapReader

NONE = "None"
"""In place of a depth that there is none of."""
NEAR = 1e-3
"""Metres from which on a depth counts."""


class ListReader(MapReader):
    """
    Attributes:
        scale: what a metre is in its PNG files.
        far: metres up to which a depth counts.
    """

    maps = "depth"
    takes = ("list",)
    scale: float
    far: float

    def __init__(self, place, list=None):
        self.root = Path(place)
        if not self.root.is_dir():
            raise UsageError(f"there is no folder at {place}; check the path")
        if list is None:
            name = self.example.partition("?")[0]
            raise UsageError(
                f"{name} needs a list of its images; give one with --list FILE (in a recipe list, eval_list)"
            )
        self.pairs = self._pairs(Path(list))

    def depth_file(self, image: str, depth: str) -> str:
        """The path from the root of the depth that a line names."""
        return depth

    def _pairs(self, file: Path) -> list[tuple[str, str | None]]:
        try:
            lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the list {file}: {error}") from None
        short = next((number for number, line in enumerate(lines, start=1) if len(line) == 1), None)
        lines = [line for line in lines if line]
        if short or not lines:
            where = f"line {short} of {file}" if short else f"{file}, which is empty,"
            raise UsageError(f"{where} is no image and depth; write lines such as rgb.jpg depth.png 518.8579")
        pairs = [
            (image.lstrip("/"), None if depth == NONE else self.depth_file(image.lstrip("/"), depth.lstrip("/")))
            for image, depth, *_ in lines
        ]
        missing = [name for pair in pairs for name in pair if name is not None and not (self.root / name).is_file()]
        if missing:
            raise UsageError(
                f"{file} names {len(missing)} files that are not under {self.root}: "
                f"{listed(missing)}; check the root, or take the lines out"
            )
        return pairs

    def __len__(self):
        return len(self.pairs)

    def open(self, index):
        return (self.root / self.pairs[index][0]).open("rb")

    def filename(self, index):
        return self.pairs[index][0]

    def map(self, index):
        name = self.pairs[index][1]
        if name is None:
            return None
        depth = png_of((self.root / name).read_bytes(), deep=True).astype(np.float32) / self.scale
        return np.where((depth > NEAR) & (depth < self.far), depth, np.float32(np.nan))
