"""Selection labels of images: which pixels matter, from PNG files of the same names or the boxes of a COCO file."""

import json
import math
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageDraw

from tosa_convert.base.errors import TosaError, TosaWarning, UsageError, some_of


class Masks(ABC):
    """Pixels that matter, by the name of the image: its path without the ending, or else its last part.

    Args:
        place: where they come from, for messages.
        known: names without endings.
    """

    def __init__(self, place: str | Path, known: list[str]):
        self.place, self.paths = place, set(known)
        stems = Counter(PurePosixPath(name).name for name in known)
        self.stems = {PurePosixPath(name).name: name for name in known if stems[PurePosixPath(name).name] == 1}

    @abstractmethod
    def mask(self, name: str, size: tuple[int, int]) -> Image.Image:
        """(width, height) of an image → its mask, "L", 255 where a pixel matters."""

    def find(self, name: str) -> str | None:
        """What is known of an image by its own path, or by the last part of it."""
        path = PurePosixPath(name).with_suffix("")
        return str(path) if str(path) in self.paths else self.stems.get(path.name)

    def check(self, files: list[str]) -> None:
        """
        Raises:
            UsageError: some of the images have none, or several the same; up to five are named.
        """
        found = {file: self.find(file) for file in files}
        missing = [file for file, name in found.items() if name is None]
        if missing:
            raise UsageError(
                f"{self.place} has nothing for {len(missing)} of {len(files)} images: {some_of(missing)}; "
                "give every image its own, an empty one where nothing matters"
            )
        twice = next((name for name, count in Counter(found.values()).items() if count > 1), None)
        if twice is not None:
            same = [file for file, name in found.items() if name == twice]
            raise UsageError(
                f"{self.place} has one {twice} for {', '.join(same[:3])}; name masks with the folders of the images"
            )

    def look_at(self, sizes: dict[str, tuple[int, int]]) -> None:
        """Open the masks of some images, by name and (width, height), before a training finds them.

        Raises:
            TosaError: one cannot be read, or is of another size than its image.
            UsageError: in none of them anything matters.
        """
        brightest = [self.mask(name, size).getextrema()[1] for name, size in sizes.items()]
        if brightest and not max(brightest):
            raise UsageError(
                f"nothing matters in {self.place}, by {len(sizes)} masks that were looked at; make white what does"
            )


class MaskFolder(Masks):
    """A folder of PNG files. In one of grey levels a pixel matters that is above half, or that is not 0 where there are
    only 0 and 1; in one with colours, as for classes, a pixel that is not black."""

    def __init__(self, place: str | Path):
        folder = Path(place)
        if not folder.is_dir():
            raise UsageError(f"there is no folder of masks at {place}; check the path")
        self.files = {
            file.relative_to(folder).with_suffix("").as_posix(): file
            for file in sorted(folder.rglob("*"))
            if file.suffix.lower() == ".png"
        }
        if not self.files:
            raise UsageError(f"{place} holds no masks; give a folder of PNG files named like the images")
        super().__init__(place, list(self.files))

    def mask(self, name, size):
        file = self.files[str(self.find(name))]
        try:
            with Image.open(file) as opened:
                deep = opened.mode.startswith("I")
                values = np.asarray(opened) if deep else _levels(_opaque(opened))
        except OSError as error:
            raise TosaError(f"cannot read the mask {file} ({type(error).__name__}); give another PNG file") from None
        if values.shape[::-1] != size:
            height, width = values.shape
            raise TosaError(
                f"the mask of {name} is {width}×{height} and the image {size[0]}×{size[1]}; make them one size"
            )
        half = 0 if values.max() <= 1 else (65535 if deep else 255) / 2
        return Image.fromarray(np.where(values > half, 255, 0).astype(np.uint8))


def _opaque(image: Image.Image) -> Image.Image:
    """On black: a pixel that nobody sees does not matter."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image
    seen = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, "black"), seen)


def _levels(image: Image.Image) -> np.ndarray:
    """(H, W) in 0 to 255; of an image with colours 255 where it is not black."""
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    colours = np.asarray(image.convert("RGB"))
    grey = (colours == colours[..., :1]).all()
    return colours[..., 0] if grey else np.where(colours.any(-1), 255, 0)


class Boxes(Masks):
    """The boxes of a COCO file: what is inside one matters."""

    def __init__(self, place: str | Path):
        if not Path(place).is_file():
            raise UsageError(f"there is no file of boxes at {place}; check the path")
        try:
            content = json.loads(Path(place).read_text(encoding="utf-8"))
            names = {
                image["id"]: PurePosixPath(image["file_name"]).with_suffix("").as_posix() for image in content["images"]
            }
            boxes = [
                (names.get(each["image_id"]), [float(side) for side in each["bbox"]]) for each in content["annotations"]
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{place} is no COCO file with images and annotations ({type(error).__name__}: {error}); give one with "
                "images: id, file_name and annotations: image_id, bbox"
            ) from None
        unlisted = [each["image_id"] for each in content["annotations"] if each["image_id"] not in names]
        if unlisted:
            raise UsageError(
                f"{place}: a box is of image {unlisted[0]!r}, which is not among its images; list it there"
            )
        if not boxes:
            raise UsageError(f"{place} has no boxes at all, so nothing would matter; give a file with annotations")
        self.said = {  # a file need not say how large its images are
            names[image["id"]]: (image["width"], image["height"])
            for image in content["images"]
            if isinstance(image.get("width"), int) and isinstance(image.get("height"), int)
        }
        self.boxes: dict[str, list[list[float]]] = {name: [] for name in names.values()}
        empty = 0
        for name, box in boxes:
            if len(box) != 4 or not all(map(math.isfinite, box)) or min(box[2:]) < 0:
                raise UsageError(f"{place}: a box of {name} is {box}; boxes are left, top, width and height in pixels")
            if min(box[2:]) == 0:  # as in COCO itself
                empty += 1
                continue
            if name in self.said:
                _check_inside(name, box, self.said[name])
            self.boxes[name].append(box)
        if empty == len(boxes):
            raise UsageError(f"{place}: no box has an area; boxes are left, top, width and height in pixels")
        if empty:
            warnings.warn(f"{place}: {empty} of {len(boxes)} boxes have no area and count for nothing", TosaWarning, 2)
        super().__init__(place, list(self.boxes))

    def mask(self, name, size):
        found, own = Image.new("L", size, 0), str(self.find(name))
        if own in self.said and self.said[own] != size:
            width, height = self.said[own]
            raise TosaError(
                f"the boxes of {name} are of an image of {width}×{height}, and it is {size[0]}×{size[1]}; give boxes "
                "of these images, with their width and height"
            )
        for box in self.boxes[own]:
            _check_inside(name, box, size)
            left, top, width, height = box
            right, bottom = max(left, left + width - 1), max(top, top + height - 1)
            ImageDraw.Draw(found).rectangle((left, top, right, bottom), fill=255)
        return found


def _check_inside(name: str, box: list[float], size: tuple[int, int]) -> None:
    left, top, width, height = box
    beyond = left < -1 or top < -1 or left + width > size[0] + 1 or top + height > size[1] + 1
    if beyond or min(left + width, top + height) <= 0 or left >= size[0] or top >= size[1]:
        raise TosaError(
            f"a box of {name}, {left:g},{top:g} {width:g}×{height:g}, is outside the image of {size[0]}×{size[1]}; "
            "boxes are left, top, width and height in pixels"
        )


def masks_of(masks: str | Path | None, boxes: str | Path | None) -> Masks | None:
    """What was given.

    Raises:
        UsageError: both.
    """
    if masks is not None and boxes is not None:
        raise UsageError("masks and boxes are both given; leave out one of the two")
    if masks is not None:
        return MaskFolder(masks)
    return None if boxes is None else Boxes(boxes)
