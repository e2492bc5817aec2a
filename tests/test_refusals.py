"""Conversions that are impossible are refused with the reason, and leave the model as it is."""

from contextlib import nullcontext

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from conftest import lively
from families import FAMILIES, HF_SMALL

from tosa_convert import convert, load
from tosa_convert.base.errors import TosaError, UsageError
from tosa_convert.models.adapter import adapter_of
from tosa_convert.selective.conversion import is_converted
from tosa_convert.selective.selection import chosen_tokens, selective_blocks


def test_a_mask_is_refused_rather_than_ignored(images):
    from tosa_convert import TosaError

    model = convert(lively(FAMILIES["timm vit"]()), layers=[2], ratio=0.5)
    with pytest.raises(TosaError, match="mask"):
        model(images, attn_mask=torch.zeros(1, 3, 17, 17))  # one for each head


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [1]}, "layer 1 cannot be selective"),
        ({"layers": [0]}, "counted from 1"),
        ({"layers": [7]}, "layers 1 to 6"),
        ({"layers": [2, 3]}, "neighbours"),
        ({"layers": [2, 2]}, "twice"),
        ({"layers": []}, "at least one"),
        ({"ratio": 0}, "out of range"),
        ({"ratio": 1.5}, "out of range"),
        ({"layers": [2, 4], "ratio": [0.5]}, "1 ratios for 2"),
        ({"ratio": [0.5, 0.5, 0.5]}, "3 ratios for 2"),
        ({"kernel": 2}, "odd"),
        ({"layrs": [2]}, "layrs"),
    ],
)
def test_impossible_options_are_refused_and_leave_the_model_alone(options, message, images):
    check_refusal(options, message, images)


def check_refusal(options, message, images):
    model = lively(FAMILIES["timm vit"]())
    wanted = model(images)
    with pytest.raises(UsageError, match=message):
        convert(model, **options)
    assert not selective_blocks(model)
    assert torch.equal(model(images), wanted)


def test_converting_twice_is_refused():
    model = convert(FAMILIES["timm vit"](), layers=[2])
    with pytest.raises(UsageError, match="converted already"):
        convert(model, layers=[4])


def test_ratios_follow_their_layers_in_any_order(images):
    model = convert(FAMILIES["timm vit"](), layers=[6, 2], ratio=[0.25, 0.75])
    model(images)
    counts = {layer: positions.shape[1] - 1 for layer, positions in chosen_tokens(model).items()}
    assert counts == {2: 12, 6: 4}


@pytest.mark.parametrize(
    "options", [{"method": "tome"}, {"method": "mctf"}, {"score": "similarity", "bypass": "merge"}]
)
def test_what_hangs_on_a_module_itself_is_not_passed_by(options, images):
    """As accelerate's hooks do, which run a layer's weights from elsewhere."""
    model = FAMILIES["timm vit"]().eval()
    wanted = model(images)
    for part in (model.blocks[1].norm1, model.blocks[1].attn, model.blocks[1].mlp):
        add_hook_to_module(part, ModelHook())
    with pytest.raises(UsageError, match=r"something has replaced forward of a .*; load the model without it"):
        convert(model, **options, ratio=0.8)
    assert not is_converted(model)
    assert torch.equal(model(images), wanted)
    remove_hook_from_submodules(model)
    assert not torch.equal(convert(model, **options, ratio=0.8)(images), wanted)


def test_a_classifier_that_looks_at_patches_too_loses_none_of_them():
    """As that of DINOv2, which joins their mean to the class token."""
    for name, fits in (("Dinov2", False), ("ViT", True)):
        config = getattr(transformers, f"{name}Config")(**HF_SMALL)
        model = getattr(transformers, f"{name}ForImageClassification")(config)
        with nullcontext() if fits else pytest.raises(UsageError, match="classify by their class token"):
            convert(model, score="norm", bypass="drop", ratio=0.5)


@pytest.mark.parametrize("options", [{}, {"method": "evit"}, {"method": "tome"}, {"method": "mctf"}])
def test_causal_attention_is_refused(options, images):
    """Found: it ran in the order of the choice, or not at all, without a word."""
    model = convert(lively(FAMILIES["timm vit"]()), **options)
    with pytest.raises(TosaError, match="causal attention"):
        model.forward_features(images, is_causal=True)


def test_a_patch_embedding_changed_after_the_conversion_is_refused():
    model = convert(lively(FAMILIES["timm vit"]()), method="tome")
    model(torch.randn(1, 3, 32, 32))
    model.set_input_size(img_size=32, patch_size=4)
    with pytest.raises(TosaError, match="convert it anew"):
        model(torch.randn(1, 3, 32, 32))


def test_an_interrupted_pass_is_forgotten_by_the_next(images):
    """Found: of several attentions side by side one of the pass before was taken for one of the next."""
    model = convert(lively(FAMILIES["timm parallel things"]()), layers=[2, 4], ratio=0.5)
    wanted = model(images)
    second = model.blocks[0].attns[1].attn.qkv
    handle = second.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(images.flip(0))
    handle.remove()
    assert torch.equal(model(images), wanted)


def test_an_empty_batch_of_gates():
    model = convert(load("quickstart"), method="spa")
    assert model(torch.zeros(0, 1, 28, 28)).shape == (0, 10)


def test_dropout_of_attention_is_found_under_each_of_its_names():
    config = transformers.YolosConfig(**{**HF_SMALL, "image_size": [32, 32]}, attention_probs_dropout_prob=0.25)
    adapter = adapter_of(transformers.YolosModel(config))
    assert adapter.attention_dropout(adapter.attention(adapter.blocks[0])) == 0.25
