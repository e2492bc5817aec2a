"""What heads cost, and how much of what its multiply-adds promise a dense model reaches in ONNX Runtime.

    python benchmarks/dense_speed.py saliency --out benchmarks/results/dense_speed.json

SALIENCY is what real_saliency.py wrote: backbone and decoder are one file. Batch 1, one thread, original and converted
models in turn.
"""

import argparse
import copy
import warnings
from pathlib import Path

import record

import tosa_convert as tc
from tosa_convert.config.bench import BenchSettings
from tosa_convert.measure.benchmark import bench
from tosa_convert.measure.macs_share import MacsShare

HEADS = ("light", "dpt", "newcrfs")
CONVERSIONS = {
    "ramp 0.8": {"ratio": 0.8},
    "ramp 0.65": {"ratio": 0.65},
    "ramp 0.52": {"ratio": 0.52},
    "ramp 0.65, segments of 3": {"ratio": 0.65, "segment": 3},
    "layers 4-12 at 0.4, one choice": {"schedule": "all", "layers": list(range(4, 13)), "ratio": 0.4, "segment": 9},
}
ROUNDS = 40


def costs() -> dict:
    """Multiply-adds of DeiT-Tiny at 224 px under each head, and alone."""
    found = {}
    for head in HEADS:
        model = tc.load("deit_tiny", pretrained=False, task="depth", head=head)
        whole, backbone = tc.flops(model).original, tc.flops(model.encoder).original
        found[head] = {"whole": whole, "backbone": backbone, "head": whole - backbone}
    return found


def speeds(model) -> dict:
    models = {"original": model}
    for name, options in CONVERSIONS.items():
        options = {"score": "similarity", "bypass": "merge", "schedule": "ramp", **options}
        models[name] = tc.convert(copy.deepcopy(model), **options)
    share = MacsShare(model)
    settings = BenchSettings(runtimes=["onnx"], rounds=ROUNDS, memory=False)
    timed = bench(models, settings)["cases"][0]["models"]
    found = {}
    for name in CONVERSIONS:
        macs, speedup = share.of(models[name]), timed[name]["speedup"]
        found[name] = {"macs": macs, "ideal": 1 / macs, "speedup": speedup, "reached": speedup * macs}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="what real_saliency.py wrote")
    parser.add_argument("--out", required=True, type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    record.write(given.out, {"heads": costs(), "speed": speeds(tc.load(given.model))})


if __name__ == "__main__":
    main()
