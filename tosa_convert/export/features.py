"""Patch and class-token features of many images, written batch by batch: memory does not grow with the folder."""

import json
import math
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tosa_convert.base.distributed import pick_device
from tosa_convert.base.errors import TosaError, UsageError
from tosa_convert.base.files import atomic
from tosa_convert.base.progress import Progress
from tosa_convert.data.images import loader
from tosa_convert.models.adapter import adapter_of
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.tasks.task import task_of

FORMATS = (".npz", ".safetensors")
TYPES = {"float32": ("<f4", "F32"), "float16": ("<f2", "F16")}
"""Number formats: name → numpy's and safetensors' names."""


def write_features(
    model: nn.Module,
    data: str | Path | None,
    out: Path,
    *,
    batch_size: int = 8,
    dtype: str = "float32",
    workers: int = 0,
    device: str | None = None,
    progress: Progress | None = None,
) -> dict:
    """Write "patches" (images, rows, columns, C), and "classes" (images, C) where there is a class token, of all
    images of a folder that can be read.

    Args:
        model: converted or not; it has to return all its tokens.
        data: a folder of images, with or without sub-folders; None takes the built-in photos.
        out: a .npz file, with the names of the images as "names", or a .safetensors file, with them in its metadata.
        dtype: number format, "float32" or "float16".

    Returns:
        {"file", "images", "patches": its shape, "classes": its shape or None, "broken": names}.
    """
    if out.suffix not in FORMATS:
        raise UsageError(f"{out.name} is neither .npz nor .safetensors; choose one of them for --out")
    if dtype not in TYPES:
        raise UsageError(f"dtype {dtype!r} is not known; choose from {', '.join(TYPES)}")
    device = pick_device(device)
    model = model.to(device).eval()
    images = task_of(model).read(data, preprocessing_of(model))
    images.reader.check_stored()
    names = [images.reader.filename(index) for index in range(len(images))]
    broken: list[str] = []
    read: list[bool] = []
    with atomic(out) as fresh, _Growing(out.parent, TYPES[dtype][0]) as arrays:
        batches = loader(images, batch_size, workers)
        with (progress or Progress()).track("features", len(batches), unit="images", per_step=batch_size) as advance:
            for batch in batches:
                broken += batch["broken"]
                read += batch["read"]
                if len(batch["images"]):
                    for name, rows in _features(model, batch["images"].to(device)).items():
                        arrays.add(name, rows)
                advance()
        if not arrays.shapes:
            raise TosaError(f"none of the images in {images.name} can be read")
        seen = [name for name, there in zip(names, read, strict=True) if there]  # of two by one name, one may be broken
        (_write_npz if out.suffix == ".npz" else _write_safetensors)(fresh, arrays, seen, dtype)
    shapes = {name: list(shape) for name, shape in arrays.shapes.items()}
    return {
        "file": str(out),
        "images": len(seen),
        "patches": shapes["patches"],
        "classes": shapes.get("classes"),
        "broken": broken,
    }


@torch.no_grad()
def _features(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    adapter = adapter_of(model)
    tokens = adapter.tokens(images.to(next(model.parameters()).dtype))
    grid = adapter.grid(images.shape[-2:])
    patches = tokens[:, adapter.prefix :]
    if patches.shape[1] != math.prod(grid):
        raise UsageError("this model removes patch tokens, so it has no features of every patch; use another bypass")
    found = {"patches": patches.unflatten(1, grid)}
    return {**found, "classes": tokens[:, 0]} if adapter.class_token else found


class _Growing:
    """Arrays that grow row by row in separate temporary files, until they are copied into it."""

    def __init__(self, folder: Path, kind: str):
        self.folder, self.kind = folder, np.dtype(kind)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def __enter__(self):
        self.place = Path(tempfile.mkdtemp(prefix=".features-", dir=self.folder))
        return self

    def __exit__(self, *error) -> None:
        shutil.rmtree(self.place, ignore_errors=True)

    def add(self, name: str, rows: torch.Tensor) -> None:
        rows = np.ascontiguousarray(rows.float().cpu().numpy(), dtype=self.kind)
        with (self.place / name).open("ab") as file:
            file.write(rows.tobytes())
        self.shapes[name] = (self.shapes.get(name, (0,))[0] + len(rows), *rows.shape[1:])

    @contextmanager
    def read(self, name: str) -> Iterator:
        with (self.place / name).open("rb") as file:
            yield file


def _write_npz(path: Path, arrays: _Growing, names: list[str], dtype: str) -> None:
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        for name, shape in arrays.shapes.items():
            header = {"descr": TYPES[dtype][0], "fortran_order": False, "shape": shape}
            with archive.open(f"{name}.npy", "w", force_zip64=True) as target, arrays.read(name) as source:
                np.lib.format.write_array_header_2_0(target, header)
                shutil.copyfileobj(source, target, 1 << 20)
        with archive.open("names.npy", "w") as target:
            np.lib.format.write_array(target, np.array(names))


def _write_safetensors(path: Path, arrays: _Growing, names: list[str], dtype: str) -> None:
    """The format's header is JSON after its length: https://github.com/huggingface/safetensors#format."""
    header, start = {"__metadata__": {"names": json.dumps(names)}}, 0
    for name, shape in arrays.shapes.items():
        end = start + int(np.prod(shape)) * arrays.kind.itemsize
        header[name] = {"dtype": TYPES[dtype][1], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for name in arrays.shapes:
            with arrays.read(name) as source:
                shutil.copyfileobj(source, target, 1 << 20)
