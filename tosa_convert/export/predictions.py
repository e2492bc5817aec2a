"""Maps that a model gives, as files: at the size of their images, each under its image's name."""

from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from tosa_convert.base.distributed import pick_device
from tosa_convert.base.errors import UsageError
from tosa_convert.base.files import atomic, check_writable
from tosa_convert.base.progress import Progress
from tosa_convert.data.dense import with_channels
from tosa_convert.models.outputs import predict
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.tasks.task import Task, task_of

ALL_16_BITS = 65535


def check_predictable(model: nn.Module, folder: Path) -> None:
    """
    Raises:
        UsageError: the model gives no maps, or the folder holds something already.
    """
    if not task_of(model).differences:
        raise UsageError("--predictions writes maps, and this model gives none; leave it out")
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty; choose another folder for the predictions")
    check_writable(folder, "--predictions")


def write_predictions(
    model: nn.Module,
    data: str | None,
    folder: Path,
    format: str = "npy",
    *,
    flip: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> dict:
    """Write the map of each image of a source.

    Args:
        format: "npy", (H, W) float32, of depth in metres, of masks the class of each pixel; NaN where the model sees
            nothing of an image; or "png", 16 bits, of depth in 1/256 metres (0 where the model sees nothing).
        flip: the mean of the maps of each image and its mirror image.

    Returns:
        {"folder", "files"}, how many.
    """
    task, device = task_of(model), pick_device(device)
    taken: set[PurePosixPath] = set()
    images = task.read(data, preprocessing_of(model))
    images.reader.check_stored()
    model.to(device).eval()
    written = 0
    with (progress or Progress()).track("predictions", len(images), unit="images") as advance:
        for index in range(len(images)):
            seen = images.seen(index)
            if seen is not None:
                image, size = seen
                found = predict(model, image[None].to(device), flip)[1]
                name = _named(images.reader.filename(index), format, taken)
                _write(_whole(task, found.cpu(), size, images.frame(size)), folder / name, task.png_scale)
                written += 1
            advance()
    return {"folder": str(folder), "files": written}


def _named(image: str, format: str, taken: set[PurePosixPath]) -> PurePosixPath:
    """Where the map of an image goes, within the folder; images that differ in their ending only keep it."""
    path = PurePosixPath(*(part for part in PurePosixPath(image).parts if part not in ("/", "..")))
    name = path.with_suffix(f".{format}")
    name = path.with_name(f"{path.name}.{format}") if name in taken else name
    taken.add(name)
    return name


def _whole(task: Task, found: torch.Tensor, size: tuple[int, int], frame: tuple[int, int, int, int]) -> np.ndarray:
    """(1, K, h, w) → (H, W) of the whole image of a (width, height), NaN where the model sees nothing of it."""
    (width, height), (left, top, right, bottom) = size, frame
    seen = F.interpolate(with_channels(found), size=(bottom - top, right - left), mode="bilinear", align_corners=False)
    whole = np.full((height, width), np.nan, np.float32)
    whole[top:bottom, left:right] = task.values(seen)[0].numpy()
    return whole


def _write(values: np.ndarray, file: Path, scale: float | None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic(file) as temporary:
        if file.suffix == ".npy":
            with temporary.open("wb") as opened:  # by name it would get an ending of numpy's
                np.save(opened, values)
            return
        known = np.nan_to_num(values, nan=0.0)
        scale = ALL_16_BITS / max(float(known.max()), 1e-12) if scale is None else scale
        numbers = (known * scale).round().clip(0, ALL_16_BITS).astype(np.uint16)
        Image.fromarray(numbers).save(temporary, format="png")
