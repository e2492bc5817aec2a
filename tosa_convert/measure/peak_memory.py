"""Peak memory of a model's forward pass.

On the CPU it is the resident memory that loading and running a model adds to a process which has imported the
libraries, measured in a process of its own: ``python -m tosa_convert.measure.peak_memory``. On a GPU it is what torch
allocates there for a model and its forward pass, which torch counts by itself.
"""

import contextlib
import importlib
import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from tosa_convert.base.errors import TosaError
from tosa_convert.export.runtimes import TYPES, onnx_runner, torch_runner
from tosa_convert.selective.selection import forget

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def on_gpu(model: nn.Module, images: torch.Tensor) -> int:
    """Bytes at the peak of a forward pass in torch: weights, images and all that lies between, what the pass before
    left among it."""
    weights = sum(value.nbytes for value in [*model.parameters(), *model.buffers()])
    forget(model)
    others = torch.cuda.memory_allocated() - weights - images.nbytes
    runner = torch_runner(model, [images], compiled=False)
    runner()
    torch.cuda.reset_peak_memory_stats()
    runner()
    return torch.cuda.max_memory_allocated() - others


def measure(model: Path, runtime: str, shape: tuple[int, ...], threads: int, precision: str) -> int | None:
    """Bytes at the peak of a forward pass on the CPU of a saved run ("eager") or an ONNX file ("onnx"); None where the
    system does not tell.

    Raises:
        TosaError: the process failed, for want of memory for instance.
    """
    if not RESET.exists():
        return None
    job = {"model": str(model), "runtime": runtime, "shape": shape, "threads": threads}
    command = [sys.executable, "-m", "tosa_convert.measure.peak_memory", json.dumps({**job, "precision": precision})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise TosaError(f"peak memory could not be measured: {last[:160]}")
    return int(done.stdout)


def resident(kind: str) -> int:
    """Bytes of this process, "VmRSS" now or "VmHWM" at the peak since :func:`forget_peak`."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    RESET.write_text("5")


def _job(model: str, runtime: str, shape: list[int], threads: int, precision: str) -> int:
    from tosa_convert import load

    torch.set_num_threads(threads)
    with contextlib.suppress(ImportError):  # it is a library too, of the models that need it
        importlib.import_module("transformers.modeling_utils")
    images = torch.randn(shape)
    before = resident("VmRSS")
    if runtime == "onnx":
        runner = onnx_runner(Path(model), [images], threads, "cpu")
    else:
        kind = TYPES[precision]
        runner = torch_runner(load(model).to(kind), [images.to(kind)], compiled=False)
    runner()  # what only a first run needs is not counted
    forget_peak()
    runner()
    return resident("VmHWM") - before


if __name__ == "__main__":
    print(_job(**json.loads(sys.argv[1])))
