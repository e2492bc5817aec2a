"""Real depth, a little of it: a small head on the real ViT-S/14, trained on one part of two stereo scenes.

    python benchmarks/stereo_scenes.py dinov2/timm.safetensors --opencv OPENCV --out results/stereo_scenes.json

The scenes are Middlebury's motorcycle (in scikit-image, with its calibration) and aloe (in OpenCV's examples; its depth
is up to an unknown factor, and 2 m for the median here). Training sees the left 60 % of each, testing the right 35 %:
two scenes say little about others, so what counts is what a conversion changes. The head alone learns. Three seeds.
"""

import argparse
import copy
import json
import tempfile
import warnings
from pathlib import Path

import numpy as np
import record
from dense_rows import converted, means, measured
from PIL import Image
from skimage.data import stereo_motorcycle

import tosa_convert as tc
from tosa_convert.config.settings import FinetuneSettings
from tosa_convert.data.sampling import sample
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.runs.provenance import as_it_is

FOCAL, BASELINE, OFFSET = 994.978, 0.193001, 31.086  # of the motorcycle: pixels, metres, pixels
MEDIAN = 2.0
SIDE, TRAINED, TESTED = 224, 160, 48
BUDGETS = (0.8, 0.7, 0.6)
METHODS = ("plan", "similarity/merge", "tome", "random")
SHOWN = ("abs_rel", "abs_rel_change", "abs_rel_error", "rmse", "silog", "delta1", "depth_error")


def scenes(opencv: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images (H, W, 3) and metres (H, W), 0 where they are not known."""
    image, _, disparity = stereo_motorcycle()
    motorcycle = np.where(np.isfinite(disparity), FOCAL * BASELINE / (np.nan_to_num(disparity, nan=1.0) + OFFSET), 0)
    aloe = np.asarray(Image.open(opencv / "aloeL.jpg").convert("RGB"))
    disparity = np.asarray(Image.open(opencv / "aloeGT.png"), np.float32)
    depth = np.where(disparity > 0, 1 / np.maximum(disparity, 1), 0)
    return [(image, motorcycle), (aloe, depth * MEDIAN / np.median(depth[depth > 0]))]


def write(folder: Path, found: list, part: slice, count: int, seed: int) -> str:
    """Random crops of a part of the scenes' width, as depth:ROOT."""
    random = np.random.default_rng(seed)
    for name in ("images", "depth"):
        (folder / name).mkdir(parents=True)
    for index in range(count):
        image, depth = found[index % len(found)]
        width = image.shape[1]
        image, depth = (each[:, int(part.start * width) : int(part.stop * width)] for each in (image, depth))
        side = int(min(depth.shape) * random.uniform(0.5, 1))
        top, left = (random.integers(0, length - side + 1) for length in depth.shape)
        box = (slice(top, top + side), slice(left, left + side))
        Image.fromarray(image[box]).save(folder / "images" / f"{index:04d}.png")
        np.save(folder / "depth" / f"{index:04d}.npy", depth[box].astype(np.float32))
    return f"depth:{folder}"


def trained(checkpoint: str, data: str, seed: int):
    head = {"task": "depth", "head": "light", "max_depth": 10.0}
    model = tc.load("vit_small_patch14_dinov2", checkpoint=checkpoint, img_size=SIDE, **head)
    model = tc.convert(model, ratio=1.0)
    settings = FinetuneSettings(steps=120, lr=1e-3, augment="flip", head_only=True)
    tc.finetune(model, data, settings, seed=seed, device="cpu")
    return as_it_is(model)


def rows(given, seed: int, scratch: Path) -> dict:
    found = scenes(given.opencv)
    train = write(scratch / "train", found, slice(0.0, 0.6), TRAINED, seed)
    test = write(scratch / "test", found, slice(0.65, 1.0), TESTED, 100 + seed)
    model = trained(given.checkpoint, train, seed)
    pixels = sample(train, preprocessing_of(model), 24)[0]
    models = {"original": copy.deepcopy(model)}
    for budget in BUDGETS:
        for method in METHODS:
            try:
                models[f"{method} {budget}"] = converted(model, method, budget, pixels)
            except tc.TosaError as error:
                print(f"{method} {budget}: {error}")
    figures = measured(models, model, test)
    return {name: {key: values[key] for key in SHOWN} for name, values in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="timm.safetensors of real_dinov2.py")
    parser.add_argument("--opencv", required=True, type=Path, help="the folder of OpenCV's example data")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", required=True, type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    done = json.loads(given.out.read_text())["results"] if given.out.exists() else {}
    for seed in given.seeds.split(","):
        if seed not in done:
            with tempfile.TemporaryDirectory() as scratch:
                done[seed] = rows(given, int(seed), Path(scratch))
            each = {f"{name} seed {seed}": row for seed, found in done.items() for name, row in found.items()}
            counts = {"train": TRAINED, "test": TESTED}
            record.write(given.out, {"images": counts, "means": means(each), "results": done})


if __name__ == "__main__":
    main()
