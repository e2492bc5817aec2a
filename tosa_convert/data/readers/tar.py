"""A tar file of images, by timm's reader. Folders inside it are classes."""

import io
import tarfile
from pathlib import Path, PurePath

from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from tosa_convert.base.errors import UsageError
from tosa_convert.data.reader import Reader, unclear
from tosa_convert.data.tar_files import check_whole


class Tar(Reader):
    example = "tar:FILE"

    def __init__(self, place):
        if not Path(place).is_file() or Path(place).suffix != ".tar":
            raise UsageError(f"there is no tar file at {place}; give an uncompressed .tar of images")
        try:
            # An open file would be shared by the processes that read; and nothing is written beside it.
            self.found = ReaderImageInTar(place, cache_tarfiles=False, cache_tarinfo=False)
            check_whole(Path(place))
        except (tarfile.TarError, EOFError, OSError) as error:
            raise UsageError(
                f"{place} is truncated, or no tar file ({error}); get it again, or uncompress it first"
            ) from None
        except ValueError:
            raise UsageError(f"{place} contains no images; give a .tar with .jpg or .png files in it") from None
        # A tar file in it counts as a folder.
        inside = {
            (PurePath(inner.path).with_suffix("") if inner else PurePath(), file.path)
            for file, _, inner in self.found.samples
        }
        self.ambiguous = unclear({(place / path).parent for place, path in inside})
        names = sorted(self.found.class_name_to_idx, key=self.found.class_name_to_idx.get)
        self.classes = [] if set(names) & {"", "."} else names

    def __len__(self):
        return len(self.found)

    def open(self, index):
        file = self.found[index][0]
        size = self.found.samples[index][0].size
        content = file.read()
        if len(content) < size:
            raise OSError(f"{self.filename(index)} is truncated")
        return io.BytesIO(content)

    def label(self, index):
        return int(self.found.targets[index])

    def filename(self, index):
        return self.found.filename(index)
