"""What people do with a model after its conversion: hooks, weight norm, pruning, patch dropout, checkpointing."""

import copy
import warnings

import pytest
import torch
from conftest import lively
from gated_models import photos
from timm.layers import set_reentrant_ckpt
from timm.models.vision_transformer import VisionTransformer
from transformers import ViTConfig, ViTModel

from tosa_convert import FinetuneSettings, TosaError, convert
from tosa_convert.selective.selection import chosen_tokens
from tosa_convert.training.losses.gates import Gates

MERGE = {"score": "similarity", "bypass": "merge", "schedule": "ramp"}
TAKING_AWAY = ("tome", "mpm", "pitome", "evit", "mctf", "frequency")


def vit(**options) -> VisionTransformer:
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 6, "num_heads": 3, "num_classes": 5}
    return lively(VisionTransformer(**{**shape, **options}).eval())


@torch.no_grad()
@pytest.mark.parametrize("part", ["norm1", "attn", "mlp"])
@pytest.mark.parametrize("options", [*({"method": method} for method in TAKING_AWAY), MERGE], ids=str)
def test_a_hook_that_changes_an_output_is_applied_once_and_to_tokens(options, part):
    model, by, seen = convert(vit(), ratio=0.8, **options), torch.randn(48), []

    def steering(module, inputs, output):
        seen.append(output.shape[1])
        return output + by

    module = getattr(model.blocks[5], part)
    handle = module.register_forward_hook(steering)
    found = model(photos(2))
    handle.remove()
    last = {"norm1": "norm1", "attn": "attn.proj", "mlp": "mlp.fc2"}[part]
    model.blocks[5].get_submodule(last).bias.add_(by)
    assert torch.allclose(found, model(photos(2)), atol=1e-5)
    assert all(count > 1 for count in seen)
    if part != "norm1":  # which methods look at before the layer runs
        assert len(seen) == 1


@torch.no_grad()
@pytest.mark.parametrize("method", ["norm", "class_attention", "idle"])
def test_what_is_read_is_what_a_later_hook_makes_of_it(method):
    options = {"method": "idle", "ratio": 0.7} if method == "idle" else {"score": method, "layers": [4], "ratio": 0.5}
    first, second = torch.randn(2, 48, 4).unbind()
    chosen = []
    for before in (True, False):
        model = vit() if before else convert(vit(), **options)
        for block in model.blocks:
            block.attn.qkv.register_forward_hook(
                lambda _, given, found: found + given[0] @ first @ second.mT.repeat(1, 3)
            )
        model = convert(model, **options) if before else model
        model(photos(2))
        chosen.append(chosen_tokens(model))
    assert all(torch.equal(chosen[1][layer], places) for layer, places in chosen[0].items())


def test_a_trace_goes_by_a_hook_too():
    model = convert(vit(), method="idle", ratio=0.7)
    by = torch.randn(48, 144)
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda _, given, found: found + given[0] @ by)
    traced = torch.jit.trace(model, (photos(2),), check_trace=False)
    assert torch.allclose(traced(photos(2)), model(photos(2)), atol=1e-5)


def test_hooks_are_heard_once_where_images_keep_their_own_numbers():
    model, heard = convert(vit(), score="norm", layers=[2, 3], threshold=4.0).train(), []
    model.blocks[2].attn.register_forward_hook(lambda *_: heard.append(torch.is_grad_enabled()))
    model(photos(3))
    assert heard == [True]


@torch.no_grad()
def test_weights_that_are_made_before_each_pass_are_not_those_of_the_last(monkeypatch):
    model = convert(vit(), method="idle", ratio=0.7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for block in model.blocks:
            torch.nn.utils.weight_norm(block.attn.qkv)
    model(photos(2))
    for block in model.blocks:
        block.attn.qkv.weight_g.mul_(torch.rand(144, 1) * 3)
    assert torch.equal(model(photos(2)), model(photos(2)))


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("method", TAKING_AWAY)
def test_two_sizes_before_one_backward_pass_under_checkpointing(method, again):
    model = convert(vit(dynamic_img_size=True), method=method, ratio=0.8)
    large, small = torch.randn(2, 3, 48, 48, requires_grad=True), torch.randn(4, 3, 32, 32, requires_grad=True)
    gradients = []
    set_reentrant_ckpt(again)
    try:
        for checkpointing in (False, True):
            model.set_grad_checkpointing(checkpointing)
            model.zero_grad()
            (model(large).square().sum() + model(small).square().sum()).backward()
            gradients.append(model.patch_embed.proj.weight.grad.clone())
    finally:
        set_reentrant_ckpt(False)
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-4 * gradients[0].abs().max())


@pytest.mark.parametrize("method", TAKING_AWAY)
def test_patch_dropout_is_refused_where_tokens_are_taken_away(method):
    model = convert(vit(img_size=64, patch_drop_rate=0.5), method=method, ratio=0.8)
    images = torch.randn(2, 3, 64, 64)
    assert model(images).isfinite().all()
    with pytest.raises(TosaError, match=r"32 of 64 patches reach the layers.*patch_drop_rate=0"):
        model.train()(images)


@torch.no_grad()
@pytest.mark.parametrize("method", ["tome", "mctf"])
def test_a_pruned_model_puts_its_tokens_back(method):
    model = convert(vit(num_classes=0), method=method, ratio=0.8)
    for each, index in ((copy.deepcopy(model), 3), (model, 2)):
        each.prune_intermediate_layers([index])
        assert len(each.blocks) == index + 1
        assert each.forward_features(photos(2)).shape == (2, 17, 48)


def test_gates_that_get_no_gradient_are_refused():
    model = convert(vit(), method="spa", ratio=0.6).train()
    set_reentrant_ckpt(True)
    try:
        model.set_grad_checkpointing(True)
        loss = Gates(model, vit(), FinetuneSettings())
        loss.tap.remove()
        loss.attended = torch.ones(2, 16, dtype=torch.bool)
        model(photos(2).requires_grad_())
        with pytest.raises(TosaError, match="re-entrant gradient checkpointing; use use_reentrant=False"):
            loss.of(None, None, None)
    finally:
        set_reentrant_ckpt(False)


def test_checkpointing_of_an_attention_that_is_not_torchs_own_works_from_the_first_step():
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 96}
    config = ViTConfig(**shape, image_size=32, patch_size=8, attn_implementation="eager")
    hf = ViTModel(config, add_pooling_layer=False)
    for model in (hf, vit()):
        for block in getattr(model, "blocks", []):
            block.attn.fused_attn = False
        convert(model, score="mutual", layers=[2, 3], threshold=-0.5).train()
        if model is hf:
            model.gradient_checkpointing_enable()
        else:
            model.set_grad_checkpointing(True)
        found = model(photos(3))
        (found if isinstance(found, torch.Tensor) else found.last_hidden_state).sum().backward()
        assert all(each.grad is None or each.grad.isfinite().all() for each in model.parameters())
