"""SPA and token impact on Fashion-MNIST, where an object's silhouette is a true selection label: top-1 after a short
fine-tuning, beside random selection of as many tokens per image and a plan whose images keep as many as they need.

    python benchmarks/gates.py --out benchmarks/results/gates.json

The quickstart's model and its images. Thresholds are set so that the mean over training images meets each budget of
the MACs, of SPA before and after; all methods are fine-tuned alike, SPA with its gates first at its own threshold for
as many steps. The gates learn with silhouettes (``spa``) and with the attention of the original (``spa, no masks``).
Takes half an hour on a core.
"""

import argparse
import copy
import tempfile
import zipfile
from importlib.resources import files
from pathlib import Path

import numpy as np
import record
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
)
from tosa_convert.data.sampling import sample
from tosa_convert.measure.evaluation import random_control
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.planning.mean_macs import at_mean
from tosa_convert.planning.plan import find_plan

BUDGETS = (0.65, 0.5, 0.8)
METHODS = ("spa", "spa, no masks", "impact", "adaptive plan")
SHORT = {"batch_size": 64, "augment": "flip"}
EXAMPLES, IMAGES = 200, 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gates.json"))
    parser.add_argument("--steps", type=int, default=75)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(str(files("tosa_convert") / "assets" / "fashion_sample.zip")) as archive:
            archive.extractall(folder)
        train, test, masks = (Path(folder) / name for name in ("train", "test", "masks"))
        silhouettes(train, masks)
        model = load("quickstart")
        rows = record.read(arguments.out).get("rows", [])  # to go on with
        original = evaluate(model, test)
        for seed in arguments.seeds:
            for budget in BUDGETS:
                for name in METHODS:
                    key = {"budget": budget, "seed": seed, "method": name}
                    if any(key.items() <= row.items() for row in rows):
                        continue
                    for row in measured(model, name, budget, seed, arguments.steps, train, test, masks):
                        rows.append({"budget": budget, "seed": seed, **row})
                        print(rows[-1], flush=True)
                        found = {"images": original["images"], "original": original["models"]["model"]["top1"]}
                        record.write(arguments.out, {**found, "steps": arguments.steps, "rows": rows})


def silhouettes(train: Path, masks: Path) -> None:
    """Every pixel of an object is brighter than the black behind it."""
    masks.mkdir(exist_ok=True)
    for file in train.rglob("*.png"):
        pixels = np.asarray(Image.open(file).convert("L"))
        Image.fromarray(((pixels > 16) * 255).astype(np.uint8)).save(masks / file.name)


def measured(model, name: str, *others) -> list[dict]:
    """The rows of a method and its control; or why it cannot be had at this budget."""
    try:
        return list(measure(model, name, *others))
    except UsageError as error:
        return [{"method": name, "refused": str(error)}]


def gated(
    model,
    method: str,
    train: Path,
    lesson: DistillSettings,
    settings: FinetuneSettings,
    seed: int,
    out: Path | None = None,
    **masks,
):
    """A model with its filter or its gates trained, at a threshold of their own, and what the filter learnt; kept in a
    folder, if one is given, to go on with."""
    converted, learnt = convert(copy.deepcopy(model), method=method), {}
    if method == "impact":
        learnt = distill(converted, train, lesson, out=out, resume=out is not None, seed=seed)
    else:
        taught = settings.model_copy(update={"gates": 1.0})
        finetune(converted, train, taught, out=out, resume=out is not None, seed=seed, **masks)
    return converted, learnt


def measure(model, name: str, budget: float, seed: int, steps: int, train: Path, test: Path, masks: Path):
    """The rows of a method and of its control."""
    images = sample(train, preprocessing_of(model), IMAGES)[0]
    settings = FinetuneSettings(steps=steps, **SHORT)
    extra = {"masks": masks} if name == "spa" else {}
    if name == "adaptive plan":
        converted, learnt = convert(copy.deepcopy(model), find_plan(model, images, budget, adaptive=True).config), {}
    else:
        lesson = DistillSettings(steps=300, examples=EXAMPLES, **SHORT)
        converted, learnt = gated(model, name.split(",")[0], train, lesson, settings, seed, **extra)
    if name != "adaptive plan":
        converted = at_mean(converted, images, budget)
    before = evaluate(converted, test)["models"]["model"]["top1"]
    random = random_control(converted, seed)
    for kind, each in ((name, converted), (f"random as {name}", random)):
        finetune(each, train, settings, seed=seed, **(extra if each is converted else {}))
        # Gates go on learning, so their thresholds are set again.
        final = at_mean(each, images, budget) if name.startswith("spa") else each
        cost = flops(final, images=sample(test, preprocessing_of(model), IMAGES)[0])
        shares = {key: getattr(cost, key) / cost.original for key in ("macs", "least", "most")}
        top1 = evaluate(final, test)["models"]["model"]["top1"]
        known = {key: learnt[key] for key in ("precision", "recall", "kept") if key in learnt}
        yield {"method": kind, **shares, "finetuned": top1, **({"top1": before, **known} if kind == name else {})}


if __name__ == "__main__":
    main()
