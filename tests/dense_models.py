"""Small models of maps, images with their maps, and the commands that take them."""

import numpy as np
import pytest
import torch
from conftest import lively
from families import FAMILIES
from PIL import Image

from tosa_convert.cli.main import main
from tosa_convert.config.head import HeadConfig
from tosa_convert.models.dense import DenseModel, with_head


def depth_model(head: str = "light", encoder: str = "timm dinov2 registers") -> DenseModel:
    torch.manual_seed(0)
    backbone = lively(FAMILIES[encoder]())
    return with_head(backbone, HeadConfig(task="depth", head=head, max_depth=10.0))


def write_pairs(root, pairs, size=(40, 48), folder="depth"):
    """Images with depth in .npy, random ones if only their number is given."""
    random = np.random.default_rng(0)
    if isinstance(pairs, int):
        pairs = [
            (random.integers(0, 255, (*size, 3), dtype=np.uint8), random.uniform(0.5, 9, size).astype(np.float32))
            for _ in range(pairs)
        ]
    for name in ("images", folder):
        (root / name).mkdir(parents=True, exist_ok=True)
    for index, (pixels, depth) in enumerate(pairs):
        Image.fromarray(pixels).save(root / "images" / f"{index}.png")
        np.save(root / folder / f"{index}.npy", depth)


def cli(*arguments) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(each) for each in arguments])
    assert not stop.value.code, arguments
