"""The latency that conversion saves: original, default rows and rows="all", in one interleaved run.

    python benchmarks/speed.py --out benchmarks/results/speed_cpu.json
    python benchmarks/speed.py --device cuda --out benchmarks/results/speed_gpu.json

Random weights, which latency does not depend on. On the CPU: one thread, ONNX Runtime and torch
eager (``--compile`` adds torch.compile). On a GPU: bf16 and fused attention, batch 64 and 256.
"""

import argparse
from pathlib import Path

import record

from tosa_convert import BenchSettings, bench, convert, load
from tosa_convert.base.progress import Progress

LAYERS = [2, 4, 6, 8, 10]
CPU = [("deit_tiny_patch16_224", 224, [8]), ("vit_small_patch14_dinov2", 518, [1])]
GPU = [(name, size, [64, 256]) for name in ("deit_small_patch16_224", "vit_base_patch16_224") for size in (224, 518)]


def line_up(name: str, size: int) -> dict:
    """The original and its conversions. 518 is no multiple of 16: those models take the nearest that is, 512."""
    side = size - size % 14 if "patch14" in name else size - size % 16
    models = {"original": load(name, pretrained=False, img_size=side)}
    for ratio in (0.8, 0.5):
        for rows in (None, "all"):
            options = {} if rows is None else {"rows": rows}
            model = load(name, pretrained=False, img_size=side)
            models[f"ratio {ratio}" + (", all rows" if rows else "")] = convert(
                model, layers=LAYERS, ratio=ratio, **options
            )
    return models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--compile", action="store_true", help="time torch.compile too")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    chosen = ["eager", *(["compile"] if arguments.compile else []), *([] if on_gpu else ["onnx"])]
    results, notes = {}, []
    for name, size, batches in GPU if on_gpu else CPU:
        settings = BenchSettings(
            runtimes=chosen,
            batch_sizes=batches,
            precisions=["bfloat16" if on_gpu else "float32"],
            rounds=arguments.rounds,
        )
        found = bench(line_up(name, size), settings, device=arguments.device, progress=Progress(shown=True))
        notes += [f"{name}: {note}" for note in found["notes"]]
        results[f"{name} {size} px"] = found["cases"]
        for case in found["cases"]:
            for model, figures in case["models"].items():
                if "speedup" in figures:
                    reached = f"{figures['speedup']:.3f}x of {figures['ideal']:.3f}x = {figures['reached']:.3f}"
                    print(name, size, case["runtime"], case["batch_size"], model, reached, flush=True)
        recorded = {"device": arguments.device, "layers": LAYERS, "results": results, "notes": notes}
        record.write(arguments.out, recorded, arguments.device)


if __name__ == "__main__":
    main()
