"""A model as something that runs: torch eager, torch.compile, ONNX Runtime, OpenVINO."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import onnxruntime
import torch
from torch import nn

from tosa_convert.base.errors import TosaError, gist
from tosa_convert.export import openvino
from tosa_convert.models.adapter import adapter_of

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ON_FILES = ("onnx", "openvino")
"""Those that run ONNX files."""
PRECISIONS = {
    **dict.fromkeys(("eager", "compile"), tuple(TYPES)),
    **dict.fromkeys(ON_FILES, ("float32", "int8")),
}
"""What each of them runs in."""
EVERY_PRECISION = tuple(dict.fromkeys(name for names in PRECISIONS.values() for name in names))
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def providers() -> list[str]:
    """What ONNX Runtime runs on here."""
    return onnxruntime.get_available_providers()


def missing(runtime: str, device: str) -> str | None:
    """Why a runtime cannot be used on a device; None if it can."""
    if runtime == "onnx" and PROVIDERS[device] not in providers():
        return f"this onnxruntime has no {PROVIDERS[device]}; install onnxruntime-gpu, or add --device cpu"
    if runtime == "openvino" and not openvino.is_installed():
        return openvino.LACKING
    if runtime == "openvino" and device != "cpu":
        return "it runs on the CPU here; add --device cpu"
    return None


def torch_runner(model: nn.Module, batches: list[torch.Tensor], compiled: bool) -> Callable[[], None]:
    """One forward pass of a model on the next of these batches, of its own device, finished when the call returns."""
    adapter = adapter_of(model)
    inputs = itertools.cycle([adapter.inputs(images) for images in batches])
    forward = torch.compile(adapter.forward, dynamic=False) if compiled else adapter.forward

    def runner() -> None:
        with torch.no_grad():
            forward(**next(inputs))
        if batches[0].is_cuda:
            torch.cuda.synchronize()

    return runner


def file_runner(runtime: str, file: Path, batches: list[torch.Tensor], threads: int, device: str) -> Callable[[], None]:
    """One run of an ONNX file in "onnx" or "openvino" on the next of these batches."""
    if runtime == "onnx":
        return onnx_runner(file, batches, threads, device)
    run = openvino.compiled(file, threads)
    feeds = itertools.cycle([{"images": images.cpu().numpy()} for images in batches])
    return lambda: run(next(feeds))


def onnx_runner(file: Path, batches: list[torch.Tensor], threads: int, device: str) -> Callable[[], None]:
    """One run of an ONNX file on the next of these batches."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Idle threads of one session would otherwise spin beside the session that is being timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with _said(file):
        session = onnxruntime.InferenceSession(str(file), options, providers=[PROVIDERS[device]])
    name = session.get_inputs()[0].name
    feeds = itertools.cycle([{name: images.cpu().numpy()} for images in batches])

    def runner() -> None:
        with _said(file):
            session.run(None, next(feeds))

    return runner


@contextlib.contextmanager
def _said(file: Path) -> Iterator[None]:
    """Errors of ONNX Runtime, which has no class of its own for them, in one line.

    Raises:
        TosaError: a file that cannot be read or run.
    """
    try:
        yield
    except Exception as error:
        raise TosaError(f"ONNX Runtime cannot run {file}: {gist(error)}; export the model again") from error
