"""WebDataset shards: tar files in which the files of one sample share a name, such as 000017.jpg and 000017.cls.

The shards on disk are indexed once, so that every image comes once in a pass whatever the number of processes, and an
interrupted training goes on where it was; what is read is the same as by streaming them.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from timm.data.readers.img_extensions import get_img_extensions

from tosa_convert.base.errors import UsageError
from tosa_convert.data.reader import Reader
from tosa_convert.data.tar_files import check_end

LABELS = ("cls", "label", "json")
MOST = 1_000_000
"""A number of a class is not larger."""
IN_JSON = ("label", "cls", "class", "target")


class Sample(NamedTuple):
    """One image: its shard, where it begins there, how long it is, its name and its label, None if there is none."""

    shard: Path
    begins: int
    size: int
    name: str
    label: int | None


class Wds(Reader):
    example = "wds:FOLDER, wds:FILE.tar or wds:shard-{000..015}.tar"

    def __init__(self, place):
        shards = _shards(place)
        self.samples = [sample for shard in shards for sample in _samples(shard)]
        if not self.samples:
            raise UsageError(f"{place} contains no images; give shards with .jpg or .png files in them")
        self.label_all([sample.label for sample in self.samples])

    def __len__(self):
        return len(self.samples)

    def open(self, index):
        sample = self.samples[index]
        with sample.shard.open("rb") as file:
            file.seek(sample.begins)
            content = file.read(sample.size)
        if len(content) < sample.size:
            raise OSError(f"{sample.shard} is truncated")
        return io.BytesIO(content)

    def label(self, index):
        label = self.samples[index].label
        return -1 if label is None else label

    def filename(self, index):
        return f"{self.samples[index].shard.name}/{self.samples[index].name}"


def _shards(place: str) -> list[Path]:
    path, braces = Path(place), re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", place)
    if braces:
        before, first, last, after = braces.groups()
        shards = [Path(f"{before}{number:0{len(first)}d}{after}") for number in range(int(first), int(last) + 1)]
    else:
        shards = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    missing = next((shard for shard in shards if not shard.is_file()), None)
    if missing or not shards:
        raise UsageError(f"there are no shards at {missing or place}; give a folder with .tar files, or one of them")
    return shards


def _samples(shard: Path) -> Iterator[Sample]:
    """Those of a shard, in its order."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, dict[str, int]] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in filter(tarfile.TarInfo.isfile, archive):
                kind = member.name.rpartition("/")[-1].lower().partition(".")[2]
                key = member.name[: len(member.name) - len(kind) - 1]
                if f".{kind.rpartition('.')[-1]}" in get_img_extensions(as_set=True):
                    if key in images:
                        raise UsageError(
                            f"the shard {shard} has several images called {key}: files belong together whose "
                            "names are the same before their first dot; rename them"
                        )
                    images[key] = member
                elif kind in LABELS and (label := _label(archive, member, kind)) is not None:
                    labels.setdefault(key, {})[kind] = label
            check_end(shard, archive.offset)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UsageError(f"the shard {shard} is damaged ({error}); get it again, or leave it out") from None
    for key, member in images.items():
        mine = labels.get(key, {})
        label = next((mine[kind] for kind in LABELS if kind in mine), None)
        yield Sample(shard, member.offset_data, member.size, member.name, label)


def _label(archive: tarfile.TarFile, member: tarfile.TarInfo, kind: str) -> int | None:
    """The number in a file; None where it is negative, or a JSON file holds none."""
    file = archive.extractfile(member)
    text = b"" if file is None else file.read()
    try:
        if kind == "json":
            facts = json.loads(text)
            found = next((facts[name] for name in IN_JSON if isinstance(facts.get(name), (int, float))), -1)
        else:
            found = int(text)
    except (ValueError, AttributeError):
        raise UsageError(
            f"{member.name} in the shard {archive.name} holds no number as its label; write one in each .cls file"
        ) from None
    if not found <= MOST or found % 1:
        raise UsageError(f"{member.name} in the shard {archive.name} holds {found}, which is no number of a class")
    return int(found) if found >= 0 else None
