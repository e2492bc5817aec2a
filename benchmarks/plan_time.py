"""How long `plan` takes on a ViT-S/14 at 224 px, on the built-in photos.

    python benchmarks/plan_time.py
    python benchmarks/plan_time.py --size 518 --budgets 0.7 --out benchmarks/results/plan_time_518.json

The weights are random ones unless a file is given: the work is the same. Takes five minutes on two cores.
"""

import argparse
import time
from pathlib import Path

import record

from tosa_convert import load
from tosa_convert.data.sampling import sample
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.planning.plan import find_plan

BUDGETS = (0.9, 0.7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plan_time.json"))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    arguments = parser.parse_args()
    chosen = {"checkpoint": arguments.weights} if arguments.weights else {"pretrained": False}
    model = load("vit_small_patch14_dinov2", img_size=arguments.size, **chosen)
    images = sample(None, preprocessing_of(model), 24)[0]
    seconds = {}
    for budget in arguments.budgets:
        began = time.perf_counter()
        find_plan(model, images, budget)
        seconds[str(budget)] = time.perf_counter() - began
        print(f"budget {budget}: {seconds[str(budget)]:.0f} s", flush=True)
    weights = "real" if arguments.weights else "random"
    found = {"seconds": seconds, "size": arguments.size, "images": len(images), "weights": weights}
    record.write(arguments.out, found)


if __name__ == "__main__":
    main()
