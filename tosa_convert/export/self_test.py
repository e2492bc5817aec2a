"""Whether exporting and quantising work on this machine, tried on a small layer."""

import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

from tosa_convert.base.seeding import unmoved
from tosa_convert.base.timing import interleave, pinned
from tosa_convert.export.quantization import Int8
from tosa_convert.export.quiet import silence
from tosa_convert.export.runtimes import onnx_runner

TOKENS, WIDTH = 256, 384
"""As a ViT-S has them."""


def try_export() -> dict[str, float]:
    """Export a layer, quantise it and time both.

    Returns:
        {"seconds": of the export, "difference": of ONNX Runtime to torch, "int8_speedup": of INT8 over float32 on one
        thread, "int8_error": of INT8, as a share of the output's size}.
    """
    with unmoved():
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)).eval()
        tokens = torch.randn(1, TOKENS, WIDTH)
    with tempfile.TemporaryDirectory() as scratch:
        file, fewer = Path(scratch) / "layer.onnx", Path(scratch) / "int8.onnx"
        began = time.perf_counter()
        with silence(), torch.no_grad():
            program = torch.onnx.export(layer, (tokens,), input_names=["images"], dynamo=True, verbose=False)
        program.save(file)
        seconds = time.perf_counter() - began
        Int8(file, Path(scratch)).write(fewer)
        with pinned(1), torch.no_grad():
            runners = {name: onnx_runner(path, [tokens], 1, "cpu") for name, path in (("f", file), ("i", fewer))}
            times = interleave(runners, rounds=30, warmup=5)
            wanted = layer(tokens).numpy()
        found, rough = (
            onnxruntime.InferenceSession(str(path)).run(None, {"images": tokens.numpy()})[0] for path in (file, fewer)
        )
    return {
        "seconds": seconds,
        "difference": float(np.abs(found - wanted).max()),
        "int8_speedup": times["f"].median / times["i"].median,
        "int8_error": float(np.abs(rough - wanted).mean() / np.abs(wanted).mean()),
    }
