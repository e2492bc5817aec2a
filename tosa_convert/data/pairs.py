"""Folders side by side: images in one, in the other a map of the same name for each."""

from pathlib import Path

from tosa_convert.base.errors import UsageError
from tosa_convert.data.maps import listed, paired
from tosa_convert.data.reader import MapReader


class PairReader(MapReader):
    """
    Attributes:
        folder: of the maps; that of the images is ``images``.
    """

    folder: str

    def __init__(self, place):
        self.root = Path(place)
        for name in ("images", self.folder):
            if not (self.root / name).is_dir():
                raise UsageError(f"there is no folder {name}/ in {place}; give one with images/ and {self.folder}/")
        self.pairs = paired(self.root, self.folder)
        if not self.pairs:
            raise UsageError(f"{self.root / 'images'} contains no images; put .jpg or .png files there")
        missing = [self._name(image) for image, file in self.pairs if file is None]
        if missing:
            raise UsageError(
                f"{self.root / self.folder} has nothing for {len(missing)} of {len(self.pairs)} images: "
                f"{listed(missing)}; give each image a .png, .npy or .pfm file of its name"
            )

    def _name(self, image: Path) -> str:
        return image.relative_to(self.root / "images").as_posix()

    def __len__(self):
        return len(self.pairs)

    def open(self, index):
        return self.pairs[index][0].open("rb")

    def filename(self, index):
        return self._name(self.pairs[index][0])
