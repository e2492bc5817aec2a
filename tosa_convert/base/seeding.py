"""What random numbers begin from: Python's, NumPy's and PyTorch's."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def random_state() -> tuple:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def set_random_state(state: tuple) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


@contextmanager
def unmoved() -> Iterator[None]:
    """Random numbers of the caller go on after this block as if it had drawn none; on the CPU."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)


def seed_everything(seed: int) -> None:
    seed_transforms(seed)
    torch.manual_seed(as_seed(seed))


def as_seed(number: int) -> int:
    """Of any whole number what PyTorch takes."""
    return number % 2**63


def seed_transforms(seed: int) -> None:
    """Seeds what augmentation draws from. Other devices stay: seeding those takes a millisecond, for each image."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(as_seed(seed))
