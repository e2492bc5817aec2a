"""What random numbers begin from: Python's, NumPy's and PyTorch's."""

import random

import numpy as np
import torch


def random_state() -> tuple:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def set_random_state(state: tuple) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


def seed_everything(seed: int) -> None:
    seed_transforms(seed)
    torch.manual_seed(seed)


def seed_transforms(seed: int) -> None:
    """Seeds what augmentation draws from. Other devices stay: seeding those takes a millisecond, for each image."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
