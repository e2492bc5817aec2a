"""A folder of images, by timm's reader. Sub-folders are classes; images at the top level have no labels."""

from pathlib import Path

from timm.data.readers.reader_image_folder import ReaderImageFolder

from tosa_convert.base.errors import UsageError
from tosa_convert.data.reader import Reader, unclear


class Folder(Reader):
    example = "FOLDER"

    def __init__(self, place):
        if not Path(place).is_dir():
            raise UsageError(f"there is no folder of images at {place}; check the path")
        try:
            self.found = ReaderImageFolder(place)
        except RuntimeError:
            raise UsageError(f"{place} contains no images; give a folder with .jpg or .png files in it") from None
        self.root = Path(place)
        names = self.found.class_to_idx
        self.classes = [] if "" in names else sorted(names, key=names.get)
        self.ambiguous = unclear({Path(path).parent.relative_to(self.root) for path, _ in self.found.samples})

    def __len__(self):
        return len(self.found)

    def open(self, index):
        return self.found[index][0]

    def label(self, index):
        return self.found.samples[index][1]

    def filename(self, index):
        return self.found.filename(index)
