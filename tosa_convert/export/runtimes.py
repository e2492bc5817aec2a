"""A model as something that runs: torch eager, torch.compile, ONNX Runtime."""

import itertools
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from torch import nn

from tosa_convert.models.adapter import adapter_of

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RUNTIMES = ("eager", "compile", "onnx")
PRECISIONS = {"eager": tuple(TYPES), "compile": tuple(TYPES), "onnx": ("float32", "int8")}
"""What each of them runs in."""
EVERY_PRECISION = tuple(dict.fromkeys(name for names in PRECISIONS.values() for name in names))
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def missing(runtime: str, device: str) -> str | None:
    """Why a runtime cannot be used on a device; None if it can."""
    if runtime == "onnx" and PROVIDERS[device] not in onnxruntime.get_available_providers():
        return f"this onnxruntime has no {PROVIDERS[device]}"
    return None


def torch_runner(model: nn.Module, batches: list[torch.Tensor], compiled: bool) -> Callable[[], None]:
    """One forward pass of a model on the next of these batches, of its own device, finished when the call returns."""
    adapter = adapter_of(model)
    inputs = itertools.cycle([adapter.inputs(images) for images in batches])
    forward = torch.compile(adapter.forward, dynamic=False) if compiled else adapter.forward

    def runner() -> None:
        with torch.inference_mode():
            forward(**next(inputs))
        if batches[0].is_cuda:
            torch.cuda.synchronize()

    return runner


def onnx_runner(file: Path, batches: list[torch.Tensor], threads: int, device: str) -> Callable[[], None]:
    """One run of an ONNX file on the next of these batches."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Idle threads of one session would otherwise spin beside the session that is being timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(file), options, providers=[PROVIDERS[device]])
    name = session.get_inputs()[0].name
    feeds = itertools.cycle([{name: images.cpu().numpy()} for images in batches])
    return lambda: session.run(None, next(feeds))
