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


def agree(value: Any) -> Any:
    """The main process's value, in every process."""
    if not several():
        return value
    join()
    return broadcast_object_list([value])[0]


def join() -> None:
    """Meet the other processes; on a machine without a GPU they talk through gloo."""
    if several():
        if not torch.cuda.is_available():
            os.environ["ACCELERATE_USE_CPU"] = "true"
        PartialState().wait_for_everyone()
