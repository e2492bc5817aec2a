"""What token reduction does to depth under NeWCRFs, trained on rendered rooms and streets: DeiT-Tiny from scratch, or
the head alone on a backbone with weights.

    python benchmarks/render_rooms.py --out rooms --train 4000 --test 300 --plan 48
    python benchmarks/depth_rendered.py --rooms rooms --work work --out benchmarks/results/depth_rendered.json
    python benchmarks/depth_rendered.py --rooms rooms --work work_dinov2 --images 4000 --fine 800 --fine-lr 1e-5 \\
        --model vit_small_patch14_dinov2 --checkpoint dinov2/timm.safetensors \\
        --out benchmarks/results/depth_rendered_dinov2.json

For each seed a model is trained as it is (only its head where the backbone has weights), then measured with its tokens
reduced and no training, and after fine-tuning with as many steps for each method, and for the original as their
control. Everything here is drawn by a script: the figures say what a method costs a model that knows these scenes, not
how well it would do on photographs. Budgets are shares of the multiply-adds of the backbone; those of the whole model
stand beside them. Goes on where it was.
"""

import argparse
import copy
import json
import time
import warnings
from functools import partial
from pathlib import Path

import record
import timm
import torch
from dense_rows import converted, means, measured
from safetensors.torch import save_file

import tosa_convert as tc
from tosa_convert.config.settings import DistillSettings, FinetuneSettings
from tosa_convert.data.sampling import sample
from tosa_convert.measure.macs import flops
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.runs.folder import save
from tosa_convert.runs.provenance import as_it_is
from tosa_convert.selective.conversion import is_converted

LAYERS, RATIO = [2, 4, 6, 8, 10], 0.8
BUDGETS = (0.8, 0.7, 0.6)
UNTRAINED = ("plan", "similarity/merge", "tome", "random")
TRAINED = ("original", "tosa", "tome", "similarity/merge")
SHOWN = ("abs_rel", "abs_rel_change", "abs_rel_error", "rmse", "silog", "delta1", "depth_error")


def base(given, seed: int):
    """The model as it is, trained on rendered scenes; kept in the work folder."""
    folder = given.work / f"base{seed}"
    if (folder / "config.json").exists():
        return tc.load(folder)
    torch.manual_seed(seed)
    given.work.mkdir(parents=True, exist_ok=True)
    checkpoint = given.checkpoint or from_scratch(given, seed)
    head = {"task": "depth", "head": given.head, "max_depth": 60.0}
    model = tc.load(given.model, checkpoint=checkpoint, img_size=given.side, **head)
    model = tc.convert(model, ratio=1.0)
    learn(model, given, seed, given.images, 5e-4, folder / "training", head_only=given.checkpoint is not None)
    save(as_it_is(model), folder)
    return tc.load(folder)


def from_scratch(given, seed: int) -> Path:
    checkpoint = given.work / f"random{seed}.safetensors"
    save_file(timm.create_model("deit_tiny_patch16_224").state_dict(), checkpoint)
    return checkpoint


def learn(model, given, seed: int, images: int, lr: float, out: Path | None = None, head_only: bool = False) -> None:
    common = {"augment": "flip", "precision": "bf16", "log_every": 25, "weight_decay": 0.05}
    settings = FinetuneSettings(steps=images // 8, lr=lr, head_only=head_only, **common)
    data = f"depth:{given.rooms / 'train'}"
    resume = out is not None and out.exists()
    tc.finetune(model, data, settings, seed=seed, out=out, resume=resume, device="cpu")


def figures(models: dict, original, given) -> dict:
    """Name of a model → its figures, of all in one pass."""
    found = measured(models, original, f"depth:{given.rooms / 'test'}")
    return {
        name: {key: found[name][key] for key in SHOWN} | (costs(model) if is_converted(model) else {})
        for name, model in models.items()
    }


def planned_on(model, given):
    return sample(f"depth:{given.rooms / 'plan'}", preprocessing_of(model), 24)[0]


def costs(model) -> dict:
    cost = flops(model)
    head = cost.original - sum(layer.original for layer in cost.layers)
    return {"macs": cost.macs / cost.original, "backbone": (cost.macs - head) / (cost.original - head)}


def seed_rows(given, seed: int, done: dict, keep) -> None:
    model = base(given, seed)
    pixels = planned_on(model, given)

    def note(rows: dict) -> None:
        """Name → what makes the model of a row."""
        started, found = time.monotonic(), {}
        for name, make in rows.items():
            if f"{name} seed {seed}" not in done:
                try:
                    found[f"{name} seed {seed}"] = make()
                except tc.TosaError as error:
                    done[f"{name} seed {seed}"] = {"refused": str(error)}
        done.update(figures(found, model, given) if found else {})
        keep()
        for name in found:
            print(f"{name}: {done[name]}, {time.monotonic() - started:.0f} s", flush=True)

    note({"original": lambda: model})
    for budget in BUDGETS:
        note({f"untrained {m} {budget}": partial(converted, model, m, budget, pixels) for m in UNTRAINED})
    for method in TRAINED:
        note({f"trained {method}": partial(trained, model, method, given, seed, pixels)})


def trained(model, method: str, given, seed: int, pixels):
    """ToSA as published (layers 2, 4, 6, 8 and 10 at ratio 0.8); the others at its multiply-adds; and the original."""
    found = copy.deepcopy(model)
    if method == "original":
        found = tc.convert(found, ratio=1.0)
    else:
        tosa = tc.convert(copy.deepcopy(model), layers=LAYERS, ratio=RATIO)
        budget = costs(tosa)["backbone"]
        # A method at a budget shares the weights of its model.
        found = tosa if method == "tosa" else copy.deepcopy(converted(model, method, budget, pixels))
    if method == "tosa":
        tc.distill(
            found, f"depth:{given.rooms / 'train'}", DistillSettings(steps=100, augment="flip"), seed=seed, device="cpu"
        )
    learn(found, given, seed, given.fine, given.fine_lr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rooms", required=True, type=Path, help="what render_rooms.py wrote")
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--model", default="deit_tiny")
    parser.add_argument("--checkpoint", type=Path, help="the backbone's weights; without: from scratch")
    parser.add_argument("--head", default="newcrfs")
    parser.add_argument("--side", type=int, default=112)
    parser.add_argument("--images", type=int, default=12000, help="seen in training")
    parser.add_argument("--fine", type=int, default=2400, help="seen in fine-tuning")
    parser.add_argument("--fine-lr", type=float, default=1e-4)
    parser.add_argument("--seeds", default="0,1,2")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    given.work.mkdir(parents=True, exist_ok=True)
    facts = {
        "model": given.model,
        "head": given.head,
        "side": given.side,
        "images": given.images,
        "fine": given.fine,
        "fine_lr": given.fine_lr,
    }
    for seed in map(int, given.seeds.split(",")):
        done = json.loads(given.out.read_text())["results"] if given.out.exists() else {}

        def keep(rows=done) -> None:
            record.write(given.out, {**facts, "means": means(rows), "results": rows})

        seed_rows(given, seed, done, keep)


if __name__ == "__main__":
    main()
