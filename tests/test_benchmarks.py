"""The scripts behind the figures can still be read, and what stands in for a part of the project still fits it."""

import importlib
from pathlib import Path

import pytest
import torch
from conftest import lively
from families import SMALL
from timm.models.vision_transformer import VisionTransformer

from tosa_convert.config.conversion import ConvertConfig
from tosa_convert.selective.row_attention import attend

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py"))


@pytest.fixture(autouse=True)
def found(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_name_that_a_script_takes_is_there(name):
    assert importlib.import_module(name).__doc__


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:flex_attention called without")
def test_every_way_to_run_a_batch_of_different_lengths_runs():
    packing = importlib.import_module("packing")
    model = lively(VisionTransformer(**{**SMALL, "img_size": 56, "patch_size": 14}))
    plan = ConvertConfig(score="norm", bypass="merge", layers=[2, 3, 4], threshold=[1.0, 1.0, 1.0])
    images = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    speeds = packing.measure(model, plan, images, rounds=1)
    assert set(speeds) == {"by image", "at once", "nested", "images", "containers", "groups", "mask", "padded"}

    lengths = (5, 3, 9, 4, 7, 6)
    query, key, value = (torch.randn(1, 2, sum(lengths), 8) for _ in range(3))
    sizes = torch.rand(1, 1, 1, sum(lengths))
    for mask in (None, sizes):
        wanted = attend(query, key, value, lengths, mask)
        others = ("grouped", "masked", "nested", "flexible")
        for way in (getattr(packing, f"{name}_attention") for name in others):
            assert torch.allclose(way(query, key, value, lengths, mask), wanted, atol=1e-5), way.__name__


def test_every_way_to_pack_a_batch_in_a_graph_gives_what_single_images_give():
    batches = importlib.import_module("onnx_batches")
    blocks = lively(VisionTransformer(**SMALL)).blocks
    tokens = torch.randn(3, 7, SMALL["embed_dim"], generator=torch.Generator().manual_seed(0))
    attends = torch.rand(len(blocks), 3, 7, generator=torch.Generator().manual_seed(1)) > 0.5
    attends[..., :2] = True
    with torch.no_grad():
        alone = batches.Blocks(blocks, "alone")
        wanted = torch.cat([alone(tokens[[at]], attends[:, [at]]) for at in range(3)])
        for way in ("row", "unpacked", "padded"):
            assert torch.allclose(batches.Blocks(blocks, way)(tokens, attends), wanted, atol=1e-5), way
