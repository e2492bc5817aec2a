"""The whole job on a small real model with real images that travel in the package."""

import shutil
import zipfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from tosa_convert.base.errors import UsageError
from tosa_convert.base.files import check_writable, read_json, write_json
from tosa_convert.reporting.result_tables import Table, mega, percent
from tosa_convert.runs.lock import writes_alone
from tosa_convert.runs.metrics_log import read_metrics

LAYERS, RATIO, BUDGET = "2,4,6,8,10", "0.5", "0.8"
MARK = "quickstart.json"
MADE = ("data", "plan", "planned", "distilled", "finetuned", "random")


@writes_alone
def run_quickstart(
    out: Path, execute: Callable[[list[str]], None], seed: int | None = None, device: str | None = None
) -> tuple[Table, dict]:
    """Run the commands that a person would type, one after the other, and sum up what they left.

    Args:
        out: folder for the images and the runs; those of an earlier quickstart there are replaced.
        execute: runs one command line, given without the program's name.
        seed, device: handed to each command that takes one.

    Returns:
        The closing table, and its figures.
    """
    _clear(out)
    data = out / "data"
    _unpack(data)
    there = ["--device", device] if device else []
    for command in commands(out, data, [*(["--seed", str(seed)] if seed is not None else []), *there], there):
        execute(command)
    results = _collect(out)
    write_json(out / MARK, results)
    return _table(results), results


def commands(out: Path, data: Path, everywhere: list[str], there: list[str]) -> list[list[str]]:
    """The commands of the quickstart.

    Args:
        everywhere: options of those that train or evaluate.
        there: of the others that use a device.
    """
    train, test = str(data / "train"), str(data / "test")
    plan, planned, distilled, finetuned, random = (str(out / name) for name in MADE[1:])
    planning = ["--budget", BUDGET, "--segment", "3", "--images", "24"]
    selective = ["--layers", LAYERS, "--ratio", RATIO]
    training = ["--data", train, "--batch-size", "64", "--augment", "flip", *everywhere]
    tuning = ["--steps", "50", *training]
    testing = ["--data", test, *everywhere]
    converted = f"{planned}/convert"
    return [
        ["plan", "quickstart", *planning, "--data", train, *there, "--out", plan],
        ["run", f"{plan}/plan.yaml", *there, "--out", planned],
        ["eval", converted, *testing],
        ["distill", "quickstart", *selective, "--steps", "60", *training, "--out", distilled],
        ["eval", distilled, *testing],
        ["finetune", distilled, *tuning, "--out", finetuned],
        ["finetune", "quickstart", *selective, "--score", "random", *tuning, "--out", random],
        ["eval", finetuned, "--no-control", *testing],
        ["eval", random, "--no-control", *testing],
        ["export", finetuned, "--onnx", "--data", test],
        ["bench", converted, "--against", finetuned, "--runtime", "onnx", "--no-memory", *there],
    ]


def _clear(out: Path) -> None:
    check_writable(out)
    if out.exists() and any(out.iterdir()):
        if not (out / MARK).exists():
            raise UsageError(f"{out} is not empty and not an earlier quickstart; choose another --out")
        for name in MADE:
            shutil.rmtree(out / name, ignore_errors=True)
    write_json(out / MARK, {"status": "unfinished"})


def _unpack(data: Path) -> None:
    """Fashion-MNIST images (MIT licence) as a folder per split and class."""
    with zipfile.ZipFile(str(files("tosa_convert") / "assets" / "fashion_sample.zip")) as archive:
        archive.extractall(data)


def _collect(out: Path) -> dict:
    """The figures of the closing table, from what the commands left in their runs."""
    planned = out / "planned" / "convert"
    top1 = {
        "original": _top1(planned, "original"),
        "plan": _top1(planned, "converted"),
        "plan_random": _top1(planned, "random selection"),
        "distilled": _top1(out / "distilled", "converted"),
        "distilled_random": _top1(out / "distilled", "random selection"),
        "finetuned": _top1(out / "finetuned", "converted"),
        "finetuned_random": _top1(out / "random", "converted"),
    }
    costs = {name: read_json(out / name / "config.json")["results"]["flops"] for name in ("finetuned", "random")}
    costs["plan"] = read_json(planned / "config.json")["results"]["flops"]
    macs = {"original": costs["plan"]["original"], **{name: cost["macs"] for name, cost in costs.items()}}
    timed = read_json(planned / "bench.json")["cases"][0]["models"]
    names = {"plan": "converted", "finetuned": str(out / "finetuned")}
    checks = {name: _last(run, "export") for name, run in (("plan", planned), ("finetuned", out / "finetuned"))}
    return {
        "status": "finished",
        "test_images": _last(planned, "eval")["images"],
        "budget": float(BUDGET),
        "layers": LAYERS,
        "ratio": float(RATIO),
        "top1": top1,
        "macs": macs,
        "speedup": {name: timed[timed_as]["speedup"] for name, timed_as in names.items()},
        "onnx": {
            name: {key: check[key] for key in ("agreement", "difference", "images")} for name, check in checks.items()
        },
    }


def _last(run: Path, stage: str) -> dict:
    """What a stage wrote to the metrics of a run when it last ran."""
    return [line for line in read_metrics(run) if line["stage"] == stage][-1]


def _top1(run: Path, name: str) -> float:
    return _last(run, "eval")["models"][name]["top1"]


def _table(results: dict) -> Table:
    top1, macs, speedup = results["top1"], results["macs"], results["speedup"]

    def row(label: str, accuracy: str, model: str | None = None) -> list[str]:
        if model is None:
            return [label, percent(top1[accuracy]), "", ""]
        cost = f"{mega(macs[model])} ({percent(macs[model] / macs['original'])})"
        return [label, percent(top1[accuracy]), cost, f"{speedup[model]:.2f}×" if model in speedup else ""]

    rows = [
        ["original", percent(top1["original"]), mega(macs["original"]), ""],
        row("plan, no training", "plan", "plan"),
        row("  random selection, same layers and ratios", "plan_random"),
        row("ToSA, distilled", "distilled", "finetuned"),
        row("  random selection", "distilled_random", "random"),
        row("ToSA, fine-tuned", "finetuned", "finetuned"),
        row("  random selection, fine-tuned", "finetuned_random", "random"),
    ]
    notes = [
        f"top-1: {results['test_images']} Fashion-MNIST test images; ToSA: layers {results['layers']}, "
        f"ratio {results['ratio']}",
        "MACs include selector cost; speed-up: ONNX Runtime, batch 1, one thread",
    ]
    if min(speedup.values()) <= 1:
        notes.append(
            "images of 28 px have 49 patches, too few for choosing tokens to pay off; larger images gain, see "
            "docs/faq.md and `tosa-convert bench MODEL`"
        )
    return Table("Quickstart", ["", "top-1", "MACs", "speed-up"], rows, notes)
