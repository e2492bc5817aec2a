"""Selection labels of images: which pixels matter, from PNG files of the same names or the boxes of a COCO file."""

import json
from abc import ABC, abstractmethod
from pathlib import Path

from PIL import Image, ImageDraw

from tosa_convert.base.errors import TosaError, UsageError


class Masks(ABC):
    """Pixels that matter, by the name of the image."""

    place: Path

    @abstractmethod
    def names(self) -> set[str]:
        """Of the images that it knows, without folders and endings."""

    @abstractmethod
    def mask(self, name: str, size: tuple[int, int]) -> Image.Image:
        """(width, height) of an image → its mask, "L", 255 where a pixel matters."""

    def check(self, files: list[str]) -> None:
        """
        Raises:
            UsageError: some of the images have none; up to five are named.
        """
        missing = [file for file in files if Path(file).stem not in self.names()]
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise UsageError(
                f"{self.place} has nothing for {len(missing)} of {len(files)} images: {', '.join(missing[:5])}{more}; "
                "give every image its own, an empty one where nothing matters"
            )


class MaskFolder(Masks):
    """A folder of PNG files: every pixel above half matters."""

    def __init__(self, place: str | Path):
        self.place = Path(place)
        self.files = {file.stem: file for file in sorted(self.place.rglob("*.png"))}
        if not self.files:
            raise UsageError(f"{place} holds no masks; give a folder of PNG files named like the images")

    def names(self):
        return set(self.files)

    def mask(self, name, size):
        with Image.open(self.files[Path(name).stem]) as opened:
            found = opened.convert("L")
        if found.size != size:
            raise TosaError(
                f"the mask of {name} is {found.width}×{found.height} and the image {size[0]}×{size[1]}; make them one "
                "size"
            )
        return found.point(lambda value: 255 if value > 127 else 0)


class Boxes(Masks):
    """The boxes of a COCO file: what is inside one matters."""

    def __init__(self, place: str | Path):
        self.place = Path(place)
        try:
            content = json.loads(self.place.read_text(encoding="utf-8"))
            stems = {image["id"]: Path(image["file_name"]).stem for image in content["images"]}
            boxes = [(stems[each["image_id"]], tuple(map(float, each["bbox"]))) for each in content["annotations"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{place} is no COCO file with images and annotations ({type(error).__name__}: {error}); give one with "
                "images: id, file_name and annotations: image_id, bbox"
            ) from None
        self.boxes: dict[str, list[tuple[float, ...]]] = {stem: [] for stem in stems.values()}
        for stem, box in boxes:
            self.boxes[stem].append(box)

    def names(self):
        return set(self.boxes)

    def mask(self, name, size):
        found = Image.new("L", size, 0)
        for left, top, width, height in self.boxes[Path(name).stem]:
            if left < -1 or top < -1 or left + width > size[0] + 1 or top + height > size[1] + 1:
                raise TosaError(
                    f"a box of {name}, {left:g},{top:g} {width:g}×{height:g}, is outside the image of "
                    f"{size[0]}×{size[1]}; boxes are left, top, width and height in pixels"
                )
            ImageDraw.Draw(found).rectangle((left, top, left + width - 1, top + height - 1), fill=255)
        return found


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
