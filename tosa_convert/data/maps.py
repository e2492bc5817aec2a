"""Files that hold a map: PNG with one channel, .npy, .pfm."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

ENDINGS = (".png", ".npy", ".pfm")
NAMED = 10


def png_of(content: bytes, deep: bool = False) -> np.ndarray:
    """(H, W) of numbers, of a picture with one channel: a PNG of 8 or 16 bits, or a .pfm file.

    Args:
        deep: it has to be of more than 8 bits.

    Raises:
        ValueError: it has several channels, or too few bits.
    """
    with Image.open(io.BytesIO(content)) as opened:
        found = _flat(np.asarray(opened))
    if deep and found.dtype.itemsize < 2:
        raise ValueError("8 bits, in place of 16")
    return found


def _flat(found: np.ndarray) -> np.ndarray:
    if found.ndim != 2:
        raise ValueError(f"{found.ndim} dimensions, in place of one number per pixel")
    return found


def read_map(file: Path, deep: bool = False) -> np.ndarray:
    """(H, W) of numbers as they stand in the file; ``deep`` as in :func:`png_of`.

    Raises:
        OSError, ValueError: it cannot be read, or holds something else.
    """
    if file.suffix.lower() == ".npy":
        try:
            found = np.load(file, allow_pickle=False)
        except (ValueError, EOFError) as error:  # numpy offers to run what the file holds, or it is empty
            raise ValueError("it is no array, or is damaged") from error
        if found.ndim == 3 and 1 in found.shape:
            found = found.squeeze()
        return _flat(found)
    return png_of(file.read_bytes(), deep)


def listed(names: list[str]) -> str:
    """The first ten, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def paired(root: Path, folder: str) -> list[tuple[Path, Path | None]]:
    """Images in ``images/`` with the file of the same name, but for its ending, in another folder; in order."""
    maps = {file.relative_to(root / folder).with_suffix(""): file for file in sorted((root / folder).rglob("*"))}
    maps = {name: file for name, file in maps.items() if file.suffix.lower() in ENDINGS}
    images = sorted(file for file in (root / "images").rglob("*") if file.suffix.lower() in IMAGES)
    return [(file, maps.get(file.relative_to(root / "images").with_suffix(""))) for file in images]


IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
