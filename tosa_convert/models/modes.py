"""A model that is looked at, and left as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module, device: str | None = None) -> Iterator[None]:
    """Within this block a model is in eval mode, and on a device if one is given; afterwards each of its modules is in
    the mode that it was in, and the model where it was."""
    modes, home = {module: module.training for module in model.modules()}, next(model.parameters()).device
    try:
        model.to(device or home).eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        model.to(home)


def is_training(model: nn.Module) -> bool:
    """Whether any part of a model is in training mode."""
    return any(module.training for module in model.modules())
