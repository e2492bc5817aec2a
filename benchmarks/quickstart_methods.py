"""Methods on the quickstart's model at 0.9, 0.8 and 0.7 of the multiply–adds: top-1 without training, and after
the same short fine-tuning.

    python benchmarks/quickstart_methods.py --out benchmarks/results/quickstart_methods.json

Fine-tuning is the quickstart's, 75 steps of 64 images, learning rate 1e-4. ToSA's selectors are distilled for
60 steps first, as there. Takes ten minutes on two cores; rows that are recorded already are not measured again.
"""

import argparse
import copy
import tempfile
import zipfile
from importlib.resources import files
from pathlib import Path

import record

from tosa_convert import DistillSettings, FinetuneSettings, UsageError, convert, distill, evaluate, finetune, load
from tosa_convert.data.sampling import sample
from tosa_convert.measure.macs import count_macs
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.planning.budget import at_budget
from tosa_convert.planning.plan import find_plan

BUDGETS = (0.9, 0.8, 0.7)
METHODS = ("plan", "tome", "evit", "idle", "tosa", "random")
SHORT = {"batch_size": 64, "augment": "flip"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quickstart_methods.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(str(files("tosa_convert") / "assets" / "fashion_sample.zip")) as archive:
            archive.extractall(folder)
        train, test = f"{folder}/train", f"{folder}/test"
        model = load("quickstart")
        original = evaluate(model, test)
        top1 = original["models"]["model"]["top1"]
        rows = record.read(arguments.out).get("rows", [])
        for budget in BUDGETS:
            for name in METHODS:
                key = {"budget": budget, "method": name}
                if any(key.items() <= row.items() for row in rows):
                    continue
                rows.append({**key, **measure(model, name, budget, train, test)})
                print(rows[-1], flush=True)
                record.write(arguments.out, {"images": original["images"], "original": top1, "rows": rows})


def measure(model, name: str, budget: float, train: str, test: str) -> dict:
    try:
        converted = planned(model, budget, train) if name == "plan" else at_budget(model, name, budget)
    except UsageError as error:
        return {"refused": str(error)}
    converted = copy.deepcopy(converted)  # at_budget shares the weights
    if name == "tosa":
        distill(converted, train, DistillSettings(steps=60, **SHORT))
    before = evaluate(converted, test)["models"]["model"]["top1"]
    finetune(converted, train, FinetuneSettings(steps=75, **SHORT))
    after = evaluate(converted, test)["models"]["model"]["top1"]
    parts = converted.tosa_config
    return {
        "macs": count_macs(converted) / count_macs(model),
        "top1": before,
        "finetuned": after,
        "convert": f"{parts.score} × {parts.bypass}",
    }


def planned(model, budget: float, train: str):
    images = sample(train, preprocessing_of(model), 48)[0]
    return convert(copy.deepcopy(model), find_plan(model, images, budget).config)


if __name__ == "__main__":
    main()
