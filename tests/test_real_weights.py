"""The real DINOv2 ViT-S/14 (benchmarks/real_dinov2.py builds it): the same verbs on really trained weights."""

import os
from pathlib import Path

import pytest
import torch

from tosa_convert import DistillSettings, convert, distill, evaluate, export_onnx, flops, load
from tosa_convert.models.adapter import run

pytestmark = [pytest.mark.real_weights, pytest.mark.timeout(1200)]
LAYERS = [2, 4, 6, 8, 10]


@pytest.fixture(scope="module")
def folder():
    place = Path(os.environ.get("TOSA_DINOV2", "dinov2"))
    if not (place / "timm.safetensors").exists():
        pytest.fail(f"no weights in {place}; build them with benchmarks/real_dinov2.py and set TOSA_DINOV2")
    return place


def opened(folder, library, size):
    if library == "transformers":
        return load(folder / "transformers", img_size=size)
    return load("vit_small_patch14_dinov2", checkpoint=folder / "timm.safetensors", img_size=size)


def test_both_libraries_give_the_same_tokens_at_the_native_size(folder):
    image = torch.randn(1, 3, 518, 518)
    with torch.inference_mode():
        first, second = (run(opened(folder, library, 518), image)["tokens"] for library in ("transformers", "timm"))
    assert torch.allclose(first, second, atol=1e-3)


@pytest.mark.parametrize("library", ["transformers", "timm"])
@pytest.mark.parametrize("size", [224, 518])
def test_ratio_one_is_the_original(library, size, folder):
    models = {"original": opened(folder, library, size), "converted": opened(folder, library, size)}
    convert(models["converted"], layers=LAYERS, ratio=1.0)
    image = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        first, second = (run(model, image)["tokens"] for model in models.values())
    assert torch.allclose(first, second, atol=1e-5)


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_distillation_beats_its_start_and_the_export_passes(library, folder, tmp_path):
    model = convert(opened(folder, library, 224), layers=LAYERS, ratio=0.5)
    first = distill(model, settings=DistillSettings(steps=1, batch_size=4, lr=1e-9))
    last = distill(model, settings=DistillSettings(steps=30, batch_size=4))
    assert last["loss"] < 0.6 * first["loss"]
    assert last["overlap"] > 0.65
    cost = flops(model)
    assert cost.original == pytest.approx(6.136e9, rel=0.005)
    assert cost.saved_without_selectors > 0.2
    figures = evaluate({"original": opened(folder, library, 224), "converted": model}, reference="original")["models"]
    assert figures["converted"]["cosine"] > 0.5
    check = export_onnx(model, tmp_path)
    assert check.passed
    assert min(check.selected.values()) > 0.99
