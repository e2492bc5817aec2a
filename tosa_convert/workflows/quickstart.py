"""The whole job on a small real model with real pictures that travel in the package."""

import shutil
import zipfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from tosa_convert.base.errors import UsageError
from tosa_convert.base.files import check_writable, read_json, write_json
from tosa_convert.reporting.tables import Table, mega, percent
from tosa_convert.runs.metrics_log import read_metrics

LAYERS, RATIO = "2,4,6,8,10", "0.5"
MARK = "quickstart.json"
MADE = ("data", "distilled", "finetuned", "random")


def run_quickstart(
    out: Path, execute: Callable[[list[str]], None], seed: int | None = None, device: str | None = None
) -> tuple[Table, dict]:
    """Run the commands that a person would type, one after the other, and sum up what they left.

    Args:
        out: folder for the pictures and the runs; those of an earlier quickstart there are replaced.
        execute: runs one command line, given without the program's name.
        seed, device: handed to each command that trains or evaluates.

    Returns:
        The closing table, and its figures.
    """
    _clear(out)
    data = out / "data"
    _unpack(data)
    everywhere = [*(["--seed", str(seed)] if seed is not None else []), *(["--device", device] if device else [])]
    for command in commands(out, data, everywhere):
        execute(command)
    results = _collect(out)
    write_json(out / MARK, results)
    return _table(results), results


def commands(out: Path, data: Path, everywhere: list[str]) -> list[list[str]]:
    """The commands of the quickstart; ``everywhere`` goes to those that train or evaluate."""
    train, test = str(data / "train"), str(data / "test")
    distilled, finetuned, random = (str(out / name) for name in ("distilled", "finetuned", "random"))
    selective = ["--layers", LAYERS, "--ratio", RATIO]
    training = ["--data", train, "--batch-size", "64", "--augment", "flip", *everywhere]
    tuning = ["--steps", "150", *training]
    testing = ["--data", test, *everywhere]
    return [
        ["distill", "quickstart", *selective, "--steps", "60", *training, "--out", distilled],
        ["eval", distilled, *testing],
        ["finetune", distilled, *tuning, "--out", finetuned],
        ["finetune", "quickstart", *selective, "--score", "random", *tuning, "--out", random],
        ["flops", finetuned],
        ["eval", finetuned, "--no-control", *testing],
        ["eval", random, "--no-control", *testing],
        ["export", finetuned, "--onnx", "--data", test],
    ]


def _clear(out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        if not (out / MARK).exists():
            raise UsageError(f"{out} is not empty and not an earlier quickstart; choose another --out")
        for name in MADE:
            shutil.rmtree(out / name, ignore_errors=True)
    check_writable(out)
    write_json(out / MARK, {"status": "unfinished"})


def _unpack(data: Path) -> None:
    """Fashion-MNIST pictures (MIT licence) as a folder per split and class."""
    with zipfile.ZipFile(str(files("tosa_convert") / "assets" / "fashion_sample.zip")) as archive:
        archive.extractall(data)


def _collect(out: Path) -> dict:
    distilled, finetuned, random = (
        {line["stage"]: line for line in read_metrics(out / name)} for name in ("distilled", "finetuned", "random")
    )
    cost = read_json(out / "finetuned" / "config.json")["results"]["flops"]
    before, after = distilled["eval"]["models"], finetuned["eval"]["models"]
    return {
        "status": "finished",
        "test_images": distilled["eval"]["images"],
        "layers": LAYERS,
        "ratio": float(RATIO),
        "top1": {
            "original": before["original"]["top1"],
            "converted": before["converted"]["top1"],
            "converted_finetuned": after["converted"]["top1"],
            "random": before["random selection"]["top1"],
            "random_finetuned": random["eval"]["models"]["converted"]["top1"],
        },
        "macs": {"original": cost["original"], "converted": cost["macs"], "selectors": cost["selectors"]},
        "onnx": {key: finetuned["export"][key] for key in ("agreement", "difference", "images")},
    }


def _table(results: dict) -> Table:
    top1, macs = results["top1"], results["macs"]
    saved = 1 - macs["converted"] / macs["original"]
    without = macs["converted"] - macs["selectors"]
    rows = [
        ["original", percent(top1["original"]), "", mega(macs["original"]), ""],
        [
            f"ToSA, ratio {results['ratio']}",
            percent(top1["converted"]),
            percent(top1["converted_finetuned"]),
            f"{mega(macs['converted'])} (−{percent(saved)})",
            percent(results["onnx"]["agreement"]),
        ],
        [
            "random selection, same ratio",
            percent(top1["random"]),
            percent(top1["random_finetuned"]),
            f"{mega(without)} (−{percent(1 - without / macs['original'])})",
            "",
        ],
    ]
    notes = [
        f"top-1 on {results['test_images']} Fashion-MNIST test pictures; layers {results['layers']} selective;",
        "ToSA's MACs include its selectors; random selection needs none",
    ]
    return Table("Quickstart", ["", "top-1", "fine-tuned", "MACs", "ONNX agreement"], rows, notes)
