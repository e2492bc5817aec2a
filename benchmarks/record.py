"""What every recorded figure needs beside it: the machine and the versions."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("tosa-convert", "torch", "timm", "transformers", "onnxruntime", "fvcore", "accelerate")


def machine() -> dict:
    """Processor, cores, Python and package versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def write(path: Path, results: dict) -> None:
    """Results with the machine they were taken on, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **results}, indent=2) + "\n")
    print(f"wrote {path}")
