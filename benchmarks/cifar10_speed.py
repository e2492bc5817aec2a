"""How fast the conversions that cifar10.py judges are in ONNX Runtime, all in one interleaved run on test images, one
thread, batch 1 unless told otherwise. Nothing else should run beside it.

    python benchmarks/cifar10_speed.py package dinov2/timm.safetensors --work cifar_work
    python benchmarks/cifar10_speed.py package dinov2/timm.safetensors --work cifar_work --methods dropped tome evit \
        --out benchmarks/results/cifar10_speed_dropped.json
    python benchmarks/cifar10_speed.py package dinov2/timm.safetensors --work cifar_work --budgets 0.65 0.5 \
        --methods plan "plan by threes" "plan by sixes" tome mctf evit dropped --batches 1 4 8 16 --rounds 15 \
        --out benchmarks/results/cifar10_speed_batches.json

It takes the classifier that cifar10.py left in the work folder, and makes that first where there is none. What is
trained afterwards changes no speed, except where a trained gate chooses how many tokens are kept: those methods are
left out. "dropped" does nothing but run fewer tokens, some being dropped by chance in the first layer: what fewer
tokens alone give.
"""

import argparse
from pathlib import Path

import record
from cifar10 import BUDGETS, SIZE, task_of
from method_rows import CONTROLS, GATED, METHODS, as_asked

from tosa_convert import UsageError, convert, flops
from tosa_convert.base.progress import Progress
from tosa_convert.config.bench import BenchSettings
from tosa_convert.data.sampling import sample
from tosa_convert.measure.benchmark import bench
from tosa_convert.measure.macs_share import MacsShare
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.selective.conversion import light_copy

DROPPED = "dropped"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument(
        "--methods", nargs="+", default=[name for name in METHODS if name not in (*GATED, *CONTROLS, "random")]
    )
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cifar10_speed.json"))
    arguments = parser.parse_args()
    task = task_of(arguments.data, arguments.weights, arguments.work)
    base = task.opened()
    met = sample(task.test, preprocessing_of(base), 48)[0]
    models, macs = {"original": base}, {}
    for budget in arguments.budgets:
        for name in arguments.methods:
            try:
                made = dropped(base, budget) if name == DROPPED else as_asked(task, base, name, budget, seed=0)
            except UsageError as error:
                print(f"{name} at {budget}: {error}")
                continue
            models[f"{name} {budget}"] = made
            cost = flops(made, images=met)
            macs[f"{name} {budget}"] = {"method": name, "budget": budget, "macs": cost.macs / cost.original}
    settings = BenchSettings(runtimes=["onnx"], batch_sizes=arguments.batches, rounds=arguments.rounds, memory=False)
    cases = bench(models, settings, data=task.test, images=48, progress=Progress())["cases"]
    rows = [
        {
            **row,
            "batch_size": case["batch_size"],
            "ms": case["models"][key]["ms"],
            "speedup": case["models"][key]["speedup"],
            "of_promised": case["models"][key]["speedup"] * row["macs"],
        }
        for case in cases
        for key, row in macs.items()
    ]
    originals = {case["batch_size"]: case["models"]["original"]["ms"] for case in cases}
    record.write(arguments.out, {"size": SIZE, "ms": originals, "rounds": arguments.rounds, "rows": rows})


def dropped(base, budget: float):
    """Tokens dropped by chance in the first layer, for good."""
    share_of = MacsShare(base)
    for percent in range(99, 0, -1):
        made = convert(light_copy(base), score="random", bypass="drop", layers=[1], ratio=percent / 100)
        if share_of.of(made) <= budget:
            return made
    raise UsageError("the first layer alone is above it")


if __name__ == "__main__":
    main()
