"""Methods in ONNX Runtime on a ViT-S/14 at 518 px, batch 1, one thread, all in turn.

    python benchmarks/method_speed.py --out benchmarks/results/method_speed.json

"ideal" is the ratio of multiply–adds with choosing counted as free. Ten layers at ratio 0.5; ToMe at the ratio that has
nearest the same multiply–adds. Needs no weights. Takes ten minutes.
"""

import argparse
from pathlib import Path

import record

from tosa_convert import BenchSettings, bench, convert, load
from tosa_convert.base.progress import Progress

TEN = dict.fromkeys(range(3, 13), 0.5)
CASES = {
    "borrow": {"score": "similarity", "bypass": "borrow", "layers": TEN},
    "borrow, segments of 5": {"score": "similarity", "bypass": "borrow", "layers": TEN, "segment": 5},
    "merge": {"score": "similarity", "bypass": "merge", "layers": TEN},
    "merge, segments of 5": {"score": "similarity", "bypass": "merge", "layers": TEN, "segment": 5},
    "random, identity": {"score": "random", "layers": TEN},
    "tome": {"method": "tome", "ratio": 0.6},
    "mctf": {"method": "mctf", "ratio": 0.6},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/method_speed.json"))
    parser.add_argument("--runtimes", nargs="+", default=["onnx"])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    models = {"original": build()} | {name: convert(build(), **options) for name, options in CASES.items()}
    settings = BenchSettings(runtimes=arguments.runtimes, rounds=arguments.rounds, memory=False)
    results = bench(models, settings, progress=Progress(True))
    for case in results["cases"]:
        for name, figures in case["models"].items():
            print(case["runtime"], name, {key: value for key, value in figures.items() if value is not None})
    record.write(arguments.out, results)


def build():
    return load("vit_small_patch14_dinov2", pretrained=False)


if __name__ == "__main__":
    main()
