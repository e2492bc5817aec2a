"""What every measured figure needs beside it: the machine and the versions."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = (
    *("tosa-convert", "torch", "timm", "transformers", "onnxruntime", "fvcore", "accelerate"),
    *("onnx", "openvino", "huggingface_hub"),
)
INT8 = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
"""What processors call their instructions for products of 8-bit numbers."""


def instructions() -> list[str]:
    """What the processor says that it can do, as Linux lists it; nothing elsewhere."""
    found = next((line for line in _processor_lines() if line.startswith(("flags", "Features"))), ":")
    return found.split(":", 1)[1].split()


def int8_instructions() -> list[str]:
    """Those for products of 8-bit numbers that this processor has."""
    known = instructions()
    return [name for name in INT8 if name in known]


def _processor_lines() -> list[str]:
    return Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []


def machine(device: str = "cpu") -> dict:
    """Processor with its instructions for INT8 (and GPU, where it computes), cores, Python and package versions."""
    names = [line.split(":", 1)[1].strip() for line in _processor_lines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "int8": int8_instructions(),
        "cores": os.cpu_count(),
        **({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}),
        "python": platform.python_version(),
        **{name: found for name in PACKAGES if (found := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # transformers is an extra
        return None
