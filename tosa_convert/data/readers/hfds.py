"""A dataset of Hugging Face's library: of the hub, or a local folder of parquet files. ``hfds:NAME`` is its training
split, or its only one; ``hfds:NAME:SPLIT`` another."""

import io
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tosa_convert.base.errors import TosaWarning, UsageError, gist
from tosa_convert.base.quiet import quiet
from tosa_convert.data.reader import Reader

CALLED = ("label", "labels", "cls")
"""What a column of labels is called."""
NAMING = ("string", "large_string", "bool")
"""Types of such a column beside whole numbers."""


class Hfds(Reader):
    example = "hfds:NAME, hfds:FOLDER or hfds:NAME:SPLIT"

    def __init__(self, place):
        self.name, self.data, self.image = opened(place)
        column, names = labels_of(self.data)
        stored = list(self.data[column]) if column else []
        names = names or sorted({label for label in stored if isinstance(label, str)})
        self.labels = numbers_of(stored, names)
        self.label_all(self.labels, names)

    def __len__(self):
        return len(self.data)

    def open(self, index):
        return io.BytesIO(bytes_of(self.data[index][self.image]))

    def label(self, index):
        return self.labels[index]

    def filename(self, index):
        found = self.data[index][self.image]
        return (found or {}).get("path") or f"{self.name}[{index}]"


def bytes_of(stored: dict | None) -> bytes:
    """Those of an image, as a dataset stores it; none if there is nothing."""
    if not stored or stored.get("bytes") is None:
        path = (stored or {}).get("path")
        return Path(path).read_bytes() if path and Path(path).is_file() else b""
    return stored["bytes"]


def opened(place: str, streaming: bool = False) -> tuple[str, Any, str]:
    """The name of a dataset, the split that is asked for with its images as they are stored, and the column that they
    are in.

    Raises:
        UsageError: it cannot be loaded, or has no such split, or no images.
    """
    name, _, split = place.rpartition(":") if ":" in place else (place, "", "")
    try:
        import datasets
    except ImportError:
        raise UsageError("hfds: needs Hugging Face's datasets: pip install 'tosa-convert[hfds]'") from None
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        with quiet("huggingface_hub", "datasets"):
            found = datasets.load_dataset(name, streaming=streaming)
    except Exception as error:
        raise UsageError(
            f"the dataset {name} cannot be loaded: {gist(error)}; give a name of the hub, or a folder of parquet files"
        ) from None
    known = list(found)
    wanted = split or ("train" if "train" in known or len(known) > 1 else known[0])
    if wanted not in known:
        raise UsageError(
            f"the dataset {name} has no split {wanted!r}; name one of {', '.join(known)}, as in hfds:{name}:{known[0]}"
        )
    data = found[wanted]
    if data.features is None:  # of a stream whose files do not tell
        data = data._resolve_features()
    column = next((name for name, kind in data.features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise UsageError(f"the dataset {name} has no column of images, only {', '.join(data.features)}")
    return name, data.cast_column(column, datasets.Image(decode=False)), column


def labels_of(data: Any) -> tuple[str, list[str]]:
    """The column of labels, empty if there is none, and the names of the classes, if it says them: one that is called
    so, or else the only one with names."""
    named = [name for name, kind in data.features.items() if hasattr(kind, "names")]
    types = {name: str(getattr(kind, "dtype", "")) for name, kind in data.features.items()}
    called = [name for name in CALLED if name in named or "int" in types.get(name, "") or types.get(name) in NAMING]
    column = called[0] if called else named[0] if len(named) == 1 else ""
    odd = next((name for name in CALLED if name in types), None)
    if not column and odd is not None:
        warnings.warn(
            f"the column {odd!r} is of type {types[odd] or 'list'}, which says no class, so the images have no labels; "
            "give numbers from 0, or names",
            TosaWarning,
            stacklevel=2,
        )
    return column, list(data.features[column].names) if column in named else []


def numbers_of(labels: Iterable, classes: list[str]) -> list[int | None]:
    """Labels as they are stored, numbers or names of classes → their numbers, None where there is none."""
    numbers = {name: number for number, name in enumerate(classes)}
    found = (numbers.get(label) if isinstance(label, str) else label for label in labels)
    return [None if label is None or label < 0 else int(label) for label in found]
