"""One program, or several processes under torchrun that must agree."""

import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from tosa_convert.base.errors import UsageError

PATIENCE = timedelta(hours=12)
"""How long processes wait for one that evaluates or exports."""


def several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_main() -> bool:
    """True in the process that writes files and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def agree(value: Any, device: str | None = None) -> Any:
    """The main process's value, in every process."""
    if not several():
        return value
    join(device)
    return broadcast_object_list([value])[0]


def pick_device(device: str | None) -> str:
    """ "cpu" or "cuda": as asked for, or a GPU if there is one.

    Raises:
        UsageError: another name, or no GPU.
    """
    if device not in (None, "cpu", "cuda"):
        raise UsageError(f"device {device!r} is not known; use cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda was asked for, but torch sees no GPU; leave --device out or use cpu")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def join(device: str | None = None) -> None:
    """Meet the other processes; on CPUs they talk through gloo."""
    if several():
        PartialState(cpu=pick_device(device) == "cpu", timeout=PATIENCE).wait_for_everyone()
