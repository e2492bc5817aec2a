"""Methods on the quickstart's model, fine-tuned on all of Fashion-MNIST until nothing is left to gain: top-1 on all
10,000 test images at 0.7 and 0.5 of the multiply–adds, three seeds.

    python benchmarks/fashion_trained_out.py --data /usr/share/datasets/fashion-mnist --work fashion_work

The data is the original four IDX files (Debian: ``apt install dataset-fashion-mnist``, MIT licence). Each run goes over
the 60,000 training images for ten epochs with a cosine to zero, from the same weights and with the same settings;
ToSA's selectors are distilled first. "original" is the unconverted model, trained on in the same way. A run takes half
an hour on one core; each is kept in the work folder with its checkpoints and added to the results as it ends, so the
script may be stopped and started again, and ``--names``, ``--budgets`` and ``--seeds`` do part of the work.
"""

import argparse
import copy
import json
from pathlib import Path

import record
import torch
from PIL import Image
from train_fashion_vit import CLASSES, read_idx

from tosa_convert import DistillSettings, FinetuneSettings, UsageError, convert, distill, finetune, load
from tosa_convert.base.progress import Progress
from tosa_convert.data.images import sample
from tosa_convert.measure.evaluation import evaluate
from tosa_convert.measure.macs import count_macs
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.planning.budget import at_budget
from tosa_convert.planning.plan import find_plan

BUDGETS = (0.7, 0.5)
NAMES = (
    "tosa",
    "random",
    "random/identity/all",
    "plan",
    "tome",
    "mctf",
    "pitome",
    "frequency",
    "evit",
    "idle",
    "original",
)
SETTINGS = {"batch_size": 128, "augment": "flip", "precision": "bf16", "checkpoint_minutes": 2.0}
FINETUNE = {**SETTINGS, "epochs": 10.0, "lr": 3e-4, "weight_decay": 0.05}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--names", nargs="+", default=NAMES)
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fashion_trained_out.json"))
    arguments = parser.parse_args()
    train, test = (unpacked(arguments.data, arguments.work, split) for split in ("train", "t10k"))
    rows = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
    for seed in arguments.seeds:
        for name in arguments.names:
            for budget in (1.0,) if name == "original" else arguments.budgets:
                key = {"name": name, "budget": budget, "seed": seed, "precision": SETTINGS["precision"]}
                if any(key.items() <= row.items() for row in rows):
                    continue
                place = arguments.work / f"{name.replace('/', '-')}-{budget}-{seed}"
                row = {**key, **one(name, budget, seed, train, test, place)}
                print(row, flush=True)
                rows.append(row)
                record.write(arguments.out, {"finetune": FINETUNE, "rows": rows})


def unpacked(data: Path, work: Path, split: str) -> Path:
    """A folder with one sub-folder per class of the images of a split."""
    folder = work / split
    if not (folder / "whole").exists():
        for index, (image, label) in enumerate(zip(*read_idx(data, split), strict=True)):
            place = folder / "images" / f"{label.item()}-{CLASSES[label]}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).save(place / f"{index:05d}.png", compress_level=1)
        (folder / "whole").touch()
    return folder / "images"


def one(name: str, budget: float, seed: int, train: Path, test: Path, place: Path) -> dict:
    """One method, trained out; its conversion is kept, so that a run goes on with the model that it began with."""
    torch.manual_seed(seed)
    model = load("quickstart")
    try:
        converted = as_asked(model, name, budget, train)
    except UsageError as error:
        return {"refused": str(error)}
    if name == "tosa":
        learnt = place / "selectors.pt"
        if not learnt.exists():
            distill(
                converted, train, DistillSettings(steps=300, **SETTINGS), out=place / "distill", seed=seed, resume=True
            )
            torch.save(converted.state_dict(), learnt)
        converted.load_state_dict(torch.load(learnt, weights_only=True))
    before = top1(converted, test)
    settings = FinetuneSettings(**FINETUNE)
    finetune(converted, train, settings, out=place / "finetune", seed=seed, resume=True, progress=Progress())
    parts = getattr(converted, "tosa_config", None)
    return {
        "macs": count_macs(converted) / count_macs(model),
        "before": before,
        "top1": top1(converted, test),
        "convert": None if parts is None else f"{parts.score} × {parts.bypass} × {parts.schedule}",
    }


def as_asked(model, name: str, budget: float, train: Path):
    if name == "original":  # one layer that skips no token
        return convert(copy.deepcopy(model), score="norm", layers=[2], ratio=1.0)
    if name == "plan":
        images = sample(train, preprocessing_of(model), 48)[0]
        return convert(copy.deepcopy(model), find_plan(model, images, budget).config)
    return copy.deepcopy(at_budget(model, name, budget))


def top1(model, test: Path) -> float:
    return evaluate(model, test, batch_size=250)["models"]["model"]["top1"]


if __name__ == "__main__":
    main()
