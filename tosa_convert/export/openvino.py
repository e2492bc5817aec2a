"""ONNX files in OpenVINO, an extra."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tosa_convert.base.errors import TosaError, UsageError, gist

LACKING = "OpenVINO is not installed; install tosa-convert[openvino]"


def is_installed() -> bool:
    return importlib.util.find_spec("openvino") is not None


def compiled(file: Path, threads: int) -> Callable[[dict[str, np.ndarray]], list[np.ndarray]]:
    """What gives all outputs of a file for its inputs, on the CPU and one request at a time, in the file's own number
    format: left to itself OpenVINO computes float32 files in bfloat16 where the processor can.

    Raises:
        UsageError: OpenVINO is not installed.
        TosaError: it cannot read or compile the file.
    """
    if not is_installed():
        raise UsageError(LACKING)
    import openvino

    core = openvino.Core()
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    try:
        model = core.compile_model(core.read_model(file), "CPU", options)
    except RuntimeError as error:
        raise TosaError(f"OpenVINO cannot run {file}: {gist(error)}") from error
    request = model.create_infer_request()

    def run(feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        found = request.infer(feed)
        return [np.array(found[port]) for port in model.outputs]

    return run
