"""What every recorded figure needs beside it: the machine and the versions."""

import json
from pathlib import Path

from tosa_convert.base.environment import machine
from tosa_convert.base.files import write_text


def read(path: Path) -> dict:
    """What was recorded before; nothing if nothing was."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, results: dict, device: str = "cpu") -> None:
    """Results with the machine they were taken on, as JSON."""
    write_text(path, json.dumps({"machine": machine(device), **results}, indent=2) + "\n")
    print(f"wrote {path}")
