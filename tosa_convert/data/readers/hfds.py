"""A dataset of Hugging Face's library: of the hub, or a local folder of parquet files. ``hfds:NAME`` is its training
split, or its only one; ``hfds:NAME:SPLIT`` another."""

import io
from pathlib import Path
from typing import Any

from tosa_convert.base.errors import UsageError
from tosa_convert.data.reader import Reader


class Hfds(Reader):
    example = "hfds:NAME, hfds:FOLDER or hfds:NAME:SPLIT"

    def __init__(self, place):
        name, _, split = place.rpartition(":") if ":" in place else (place, "", "")
        self.data, self.image = _loaded(name, split)
        self.name = name
        self.labels, self.classes = _labels(self.data)
        self.numbered = bool(self.labels) and not self.classes
        if self.numbered:
            self.classes = [str(number) for number in range(1 + max(self.data[self.labels]))]

    def __len__(self):
        return len(self.data)

    def open(self, index):
        found = self.data[index][self.image]
        content = found.get("bytes") if found else None
        if content is None and not (found and found.get("path")):
            raise OSError(f"{self.filename(index)} is empty")
        return io.BytesIO(content) if content is not None else Path(found["path"]).open("rb")

    def label(self, index):
        return int(self.data[index][self.labels])

    def filename(self, index):
        found = self.data[index][self.image]
        return (found or {}).get("path") or f"{self.name}[{index}]"


def _loaded(name: str, split: str) -> tuple[Any, str]:
    """The split of a dataset, its images as they are stored, and the column that they are in."""
    try:
        import datasets
    except ImportError:
        raise UsageError("hfds: needs Hugging Face's datasets: pip install 'tosa-convert[hfds]'") from None
    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(name)
    except Exception as error:
        raise UsageError(
            f"the dataset {name} cannot be loaded: {' '.join(str(error).split())[:150]}; give a name of the hub, or a "
            "folder of parquet files"
        ) from None
    known = list(found)
    wanted = split or ("train" if "train" in known or len(known) > 1 else known[0])
    if wanted not in known:
        raise UsageError(
            f"the dataset {name} has no split {wanted!r}; name one of {', '.join(known)}, as in hfds:{name}:{known[0]}"
        )
    data = found[wanted]
    column = next((name for name, kind in data.features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise UsageError(f"the dataset {name} has no column of images, only {', '.join(data.features)}")
    return data.cast_column(column, datasets.Image(decode=False)), column


def _labels(data: Any) -> tuple[str, list[str]]:
    """The column of labels, empty if there is none, and the names of the classes, if they have any."""
    named = next((name for name, kind in data.features.items() if hasattr(kind, "names")), None)
    if named:
        return named, list(data.features[named].names)
    types = {name: str(getattr(kind, "dtype", "")) for name, kind in data.features.items()}
    return next((name for name in ("label", "labels", "cls") if "int" in types.get(name, "")), ""), []
