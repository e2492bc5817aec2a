import copy

import pytest
import torch
from conftest import lively
from families import FAMILIES, MOSTLY_LONG

from tosa_convert import convert, flops, load
from tosa_convert.measure.macs import _count, count_macs
from tosa_convert.measure.macs_share import MacsShare

PAPER = {"layers": [2, 4, 6, 8, 10], "ratio": 0.8}


def analytic(width, depth, tokens, classes, patch, patches, mlp=4):
    """Multiply–adds of a plain ViT: projections, attention, MLP, patch embedding, head; LayerNorm as fvcore has it."""
    block = tokens * width * width * (4 + 2 * mlp) + 2 * tokens * tokens * width + 2 * 5 * tokens * width
    return depth * block + patches * width * patch * patch * 3 + width * classes + 5 * tokens * width


@pytest.fixture(scope="module")
def deit():
    return load("deit_tiny", pretrained=False)


def test_deit_tiny_counts_as_it_should(deit):
    cost = flops(deit)
    assert round(cost.macs / 1e9, 3) == 1.258
    assert cost.macs == cost.original
    assert cost.macs == pytest.approx(analytic(192, 12, 197, 1000, 16, 196), rel=0.005)
    assert "aten::scaled_dot_product_attention" not in cost.uncounted
    assert "aten::gelu" in cost.uncounted


def test_attention_counts_the_same_fused_or_not(deit):
    image = torch.zeros(1, 3, 224, 224)
    fused = _count(deit, image)[0][""]
    for block in deit.blocks:
        block.attn.fused_attn = False
    plain = _count(deit, image)[0][""]
    for block in deit.blocks:
        block.attn.fused_attn = True
    assert plain == pytest.approx(fused, rel=0.002)


def test_the_papers_setting_saves_nine_percent_before_its_selectors(deit):
    cost = flops(convert(load("deit_tiny", pretrained=False), **PAPER))
    assert cost.saved_without_selectors == pytest.approx(0.090, abs=0.001)
    assert 0 < cost.saved < cost.saved_without_selectors
    kept = -(-196 * 8 // 10)
    ordinary = analytic(192, 1, 197, 0, 0, 0) - 5 * 197 * 192
    selective = analytic(192, 1, 1 + kept, 0, 0, 0) - 5 * (1 + kept) * 192
    for layer in cost.layers:
        assert layer.tokens == (kept if layer.layer in PAPER["layers"] else 196)
        expected = selective if layer.layer in PAPER["layers"] else ordinary
        assert layer.macs - layer.selector == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize("rows", ["all", 16, 32])
def test_the_selector_is_charged_for_its_own_work(deit, rows):
    cost = flops(convert(load("deit_tiny", pretrained=False), **PAPER, rows=rows))
    read = 197 if rows == "all" else rows
    maps = read * 197 * 192
    convolutions = read * (197 + 2) * (3 * 6 * 3) * 2  # padded by one position on either side
    assert cost.layers[1].selector == pytest.approx(maps + convolutions, rel=0.001)
    assert cost.selectors == 5 * cost.layers[1].selector


def test_ratio_two_fifths_would_save_what_the_paper_says():
    cost = flops(convert(load("deit_tiny", pretrained=False), layers=PAPER["layers"], ratio=0.4))
    assert cost.saved_without_selectors == pytest.approx(0.258, abs=0.004)


@pytest.mark.parametrize("name", ["timm vit", "hf Dinov2Model", "hf SiglipVisionModel"])
def test_layers_add_up_and_fall_as_predicted(name):
    model = convert(lively(FAMILIES[name]()), layers=[2, 4], ratio=0.5, score="random")
    cost = flops(model)
    assert cost.layers[1].tokens * 2 == cost.layers[0].tokens
    assert cost.macs - sum(layer.macs for layer in cost.layers) == cost.original - sum(
        layer.original for layer in cost.layers
    )
    assert cost.layers[1].macs < 0.6 * cost.layers[1].original
    assert cost.layers[2].macs == cost.layers[2].original


def test_counting_at_another_size_scales_the_tokens(deit):
    cost = flops(load("deit_tiny", pretrained=False, img_size=384))
    assert cost.size == (384, 384)
    assert cost.layers[0].tokens == 576


def test_a_models_weights_and_state_survive_counting(deit):
    model = convert(load("quickstart"), layers=[2, 4], ratio=0.5)
    image = torch.randn(2, 1, 28, 28)
    wanted = model(image)
    flops(model)
    assert torch.equal(model(image), wanted)


def test_a_selector_is_not_charged_for_rows_that_do_not_exist():
    many, all_rows = (
        flops(convert(load("deit_tiny", pretrained=False), **PAPER, rows=rows)).selectors for rows in (1000, "all")
    )
    assert many == all_rows


@pytest.mark.parametrize("name", MOSTLY_LONG)
def test_a_share_is_what_fvcore_counts(name):
    torch.manual_seed(0)
    model = lively(FAMILIES[name]())
    share_of, whole = MacsShare(model), count_macs(model)
    for options in ({"score": "similarity", "ratio": 0.6}, {"score": "attention", "ratio": 0.5, "layers": [2, 4]}):
        converted = convert(copy.deepcopy(model), **options)
        assert share_of.of(converted) == pytest.approx(count_macs(converted) / whole, rel=1e-9)
        assert converted.training == model.training
