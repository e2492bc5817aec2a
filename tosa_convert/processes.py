"""One program, or several processes under torchrun that must agree."""

import os
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list


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


def on_cpu(device: str | None) -> bool:
    """Whether training runs on the CPU: asked for, or for want of a GPU."""
    return device == "cpu" or not torch.cuda.is_available()


def join(device: str | None = None) -> None:
    """Meet the other processes; on CPUs they talk through gloo."""
    if several():
        PartialState(cpu=on_cpu(device)).wait_for_everyone()
