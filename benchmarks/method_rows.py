"""Rows of a table of methods on labelled images: each method at each budget and seed, judged on test images without
training and after the same fine-tuning. What cifar10.py and fashion_trained_out.py share.

A row is kept in the work folder until it is in the results, so that a script may be stopped and started again.
"""

import argparse
import copy
import functools
import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import record
import torch
from filelock import FileLock
from gates import gated
from torch import nn

from tosa_convert import DistillSettings, FinetuneSettings, UsageError, convert, distill, evaluate, finetune, flops
from tosa_convert.base.environment import machine
from tosa_convert.base.files import write_json
from tosa_convert.base.progress import Progress
from tosa_convert.config.bench import BenchSettings
from tosa_convert.config.conversion import ConvertConfig
from tosa_convert.data.sampling import sample
from tosa_convert.measure.benchmark import bench
from tosa_convert.measure.evaluation import random_control
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.planning.budget import at_budget
from tosa_convert.planning.mean_macs import at_mean, check_reachable
from tosa_convert.planning.plan import find_plan

ORIGINAL = "original"
"""The unconverted model, trained on alike."""
PLANS = {"plan": None, "plan by threes": 3, "plan by sixes": 6}
"""So many layers share a choice, for speed."""
GATED = ("spa", "impact")
COUNTED = 1000
"""Images that thresholds are set on, and others that multiply–adds are counted over: what images keep differs a lot."""
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


@dataclass(frozen=True)
class Task:
    """A model, its images, and how long it is trained on them."""

    opened: Callable[[], nn.Module]
    """The original; a function of a module, or a partial of one, so that other processes can call it."""
    train: Path
    test: Path
    work: Path
    finetune: dict
    distill: dict
    """For ToSA's selectors and token impact's filter."""
    device: str = "cpu"
    half: bool = False
    """Judge in bfloat16."""
    timed: bool = False
    """Measure the speed in ONNX Runtime beside it."""
    masks: Path | None = None
    """Selection labels that SPA's gates learn; otherwise the attention of the original."""


def arguments_of(doc: str, methods: tuple[str, ...], budgets: tuple[float, ...], out: Path) -> argparse.ArgumentParser:
    """What both scripts understand."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=methods)
    parser.add_argument("--budgets", nargs="+", type=float, default=budgets)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--processes", type=int, default=1, help="rows that are measured at once")
    parser.add_argument("--out", type=Path, default=out)
    return parser


def fill(task: Task, arguments: argparse.Namespace, given: dict, about: dict) -> None:
    """Measure the rows that the results do not have yet, and add each to them as it comes.

    Args:
        given: what the rows were measured with, so that rows measured otherwise are not taken for them.
        about: written at the head of the results.
    """
    rows = record.read(arguments.out).get("rows", [])
    given = {ORIGINAL: kept_top1(task), **given}
    keys = [
        {**given, "method": name, "budget": budget, "seed": seed}
        for seed in arguments.seeds
        for budget in arguments.budgets
        for name in arguments.methods
        if name != ORIGINAL
    ]
    if ORIGINAL in arguments.methods:
        keys += [{**given, "method": ORIGINAL, "budget": 1.0, "seed": seed} for seed in arguments.seeds]
    keys = [key for key in keys if not any(key.items() <= row.items() for row in rows)]
    for row in measured(task, keys, arguments.processes):
        print(row, flush=True)
        rows.append(row)
        record.write(arguments.out, {**about, "finetune": task.finetune, "rows": rows}, task.device)
        shutil.rmtree(place_of(task, row["method"], row["budget"], row["seed"]), ignore_errors=True)


def place_of(task: Task, name: str, budget: float, seed: int) -> Path:
    """Where a row is kept while it is worked on."""
    return task.work / f"{name.replace('/', '-')}-{budget}-{seed}"


def measured(task: Task, keys: list[dict], processes: int) -> Iterator[dict]:
    """Rows, as they come."""
    row_of = functools.partial(measure, task)
    if processes == 1:
        yield from map(row_of, keys)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        try:
            for found in as_completed([pool.submit(row_of, key) for key in keys]):
                yield found.result()
        finally:  # after an error, or Ctrl-C
            pool.shutdown(cancel_futures=True)


def measure(task: Task, key: dict) -> dict:
    """One row; rows of a table may come from several machines, over weeks."""
    found = one(task, task.opened().to(task.device), key["method"], key["budget"], key["seed"])
    about = machine(task.device)
    return {**key, **found, "processor": about.get("gpu", about["cpu"])}


def kept_top1(task: Task) -> float:
    """Top-1 of the original, measured once."""
    file = task.work / f"original-{task.device}.json"
    if not file.exists():
        write_json(file, top1(task, {ORIGINAL: task.opened().to(task.device)})[ORIGINAL])
    return json.loads(file.read_text())


def one(task: Task, base: nn.Module, name: str, budget: float, seed: int) -> dict:
    """One method at one budget. Gates are trained once for all budgets: their thresholds are set afterwards."""
    place = place_of(task, name, budget, seed)
    torch.manual_seed(seed)
    try:
        converted = as_asked(task, base, name, budget, seed)
    except UsageError as error:
        return {"refused": str(error)}
    if name == "tosa":
        distill(converted, task.train, DistillSettings(**task.distill), out=place / "distill", seed=seed, resume=True)
    before, settings = copy.deepcopy(converted), FinetuneSettings(**task.finetune)
    kept = {"out": place / "finetune", "seed": seed, "resume": True}
    finetune(converted, task.train, settings, **kept, progress=Progress(), **labels_of(task, name))
    counted, moved = sample(task.test, preprocessing_of(base), COUNTED)[0], {}
    if converted.tosa_config.threshold is not None:  # training changes what thresholds were set for
        moved = {"macs_until_moved": 1 - flops(converted, images=counted).saved}
        converted = at_mean(converted, calibration(task, base, COUNTED), budget)
    parts, macs = converted.tosa_config, 1 - flops(converted, images=counted).saved
    right = top1(task, {"before": before, "top1": converted})
    return {
        "macs": macs,
        **moved,
        **right,
        # chance is not exported, and the original is what others are timed against
        **(speed(task, base, converted, macs) if task.timed and name not in (ORIGINAL, *CONTROLS) else {}),
        "convert": f"{parts.score} × {parts.bypass} × {parts.schedule}",
    }


def speed(task: Task, base: nn.Module, converted: nn.Module, macs: float) -> dict:
    settings = BenchSettings(runtimes=["onnx"], rounds=20, memory=False)
    timed = bench({ORIGINAL: base, "converted": converted}, settings, data=task.test)
    speedup = timed["cases"][0]["models"]["converted"]["speedup"]
    return {"speedup": speedup, "of_promised": speedup * macs}


def as_asked(task: Task, base: nn.Module, name: str, budget: float, seed: int) -> nn.Module:
    """A copy of the base, converted so that it takes a budget of the MACs.

    Raises:
        UsageError: it cannot come down to the budget.
    """
    if name == ORIGINAL:  # one layer that skips no token
        return convert(copy.deepcopy(base), score="norm", layers=[2], ratio=1.0)
    if name in (*PLANS, "adaptive"):
        return convert(copy.deepcopy(base), planned(task, base, name, budget))
    if name in CONTROLS:
        return random_control(as_asked(task, base, CONTROLS[name], budget, seed), seed)
    if name in GATED:
        images = calibration(task, base, COUNTED)
        check_reachable(convert(copy.deepcopy(base), method=name), images, budget)  # before the training, not after it
        lesson, settings = DistillSettings(**task.distill, examples=200), FinetuneSettings(**task.finetune)
        place = task.work / f"gates-{name}-{seed}"
        with FileLock(f"{place}.lock"):  # the first row that needs them trains them, the others wait
            learnt = gated(base, name, task.train, lesson, settings, seed, place, **labels_of(task, name))[0]
        return at_mean(learnt, images, budget)
    try:
        return copy.deepcopy(at_budget(base, name, budget))
    except UsageError:
        if name not in DEEPER:
            raise
        return copy.deepcopy(at_budget(base, DEEPER[name], budget))


def labels_of(task: Task, name: str) -> dict[str, Path]:
    """The control of SPA learns from the same, so that its gates let as many tokens through."""
    return {"masks": task.masks} if name.endswith("spa") and task.masks else {}


def planned(task: Task, base: nn.Module, name: str, budget: float) -> ConvertConfig:
    """The same one for every seed."""
    kept = task.work / f"{name}-{budget}-{task.device}.json"
    with FileLock(f"{kept}.lock"):
        if not kept.exists():
            images = calibration(task, base, 32)
            found = find_plan(base, images, budget, segment=PLANS.get(name), adaptive=name == "adaptive")
            write_json(kept, found.config.model_dump())
    return ConvertConfig(**json.loads(kept.read_text()))


def calibration(task: Task, base: nn.Module, count: int) -> torch.Tensor:
    """Training images that plans and thresholds are found on."""
    return sample(task.train, preprocessing_of(base), count)[0].to(task.device)


def top1(task: Task, models: dict[str, nn.Module]) -> dict[str, float]:
    """Of each, in one pass over the test images."""
    with torch.autocast(task.device, torch.bfloat16, enabled=task.half):
        batch_size = 50 if task.device == "cpu" else 250
        found = evaluate(models, task.test, batch_size=batch_size, device=task.device, progress=Progress())
    return {name: figures["top1"] for name, figures in found["models"].items()}
