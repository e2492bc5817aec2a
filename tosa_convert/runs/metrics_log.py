"""``metrics.jsonl``: what was measured in a run, line by line."""

import json
import os
from pathlib import Path

from tosa_convert.base.files import atomic


def append_metrics(folder: Path, **values) -> None:
    """One line of ``metrics.jsonl``, of its own also where the last one was cut off."""
    with (folder / "metrics.jsonl").open("a+b") as file:
        file.seek(-min(1, file.tell()), os.SEEK_END)
        begins = "" if file.read(1) in (b"", b"\n") else "\n"
        file.write(f"{begins}{json.dumps(values)}\n".encode())


def read_metrics(folder: Path) -> list[dict]:
    """The lines of ``metrics.jsonl``; a last one that was cut off by a kill or a full disk is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def cut_metrics(folder: Path, stage: str, step: int) -> None:
    """Forget what was noted after the checkpoint that a resumed training starts from."""
    kept = [line for line in read_metrics(folder) if line.get("stage") != stage or line.get("step", 0) <= step]
    with atomic(folder / "metrics.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
