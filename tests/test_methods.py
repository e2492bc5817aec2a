"""Score × bypass × schedule on every family, against the original's own blocks; what does not fit together."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch
from conftest import LAYERS, lively
from families import FAMILIES
from references import close, first
from test_refusals import check_refusal

from tosa_convert import (
    ConvertConfig,
    FinetuneSettings,
    TosaError,
    UsageError,
    convert,
    finetune,
    flops,
    load,
    original,
    random_control,
    save,
)
from tosa_convert.methods.bypass import Bypass
from tosa_convert.methods.parts import every
from tosa_convert.methods.score import Acts
from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.selective.selection import chosen_tokens, selective_blocks

WHOLE = tuple(name for name, part in every(Bypass).items() if part.acts is Acts.AROUND)
LASTING = tuple(every(Bypass).keys() - set(WHOLE))
SCORES = ("attention", "class_attention", "similarity", "norm", "random")
PAIRS = [*product(SCORES, WHOLE), *product(SCORES, ("persist",)), ("class_attention", "fuse")]


PAIRS += [("multi_criteria", "pool"), ("similarity", "pool"), ("class_query", "merge"), ("class_query", "persist")]


def fits(model, score: str, bypass: str) -> bool:
    adapter = adapter_of(model)
    apart = type(adapter).__name__ not in ("TimmFused", "TransformersDpt")  # attention and MLP as modules of their own
    whole_only = adapter.windows or not apart or "ResPost" in type(adapter.blocks[0]).__name__
    if score == "class_query" and not adapter.own_heads:
        return False
    return (adapter.class_token or not score.startswith("class_")) and not (whole_only and bypass in LASTING)


def layers_for(score: str) -> list[int]:
    return LAYERS if score == "attention" else [2, 3, 4, 6]


@pytest.mark.parametrize(("score", "bypass"), PAIRS)
def test_ratio_one_equals_the_original(family, images, score, bypass):
    if not fits(family, score, bypass):
        pytest.skip("this family has not got the parts")
    wanted = run(family, images)
    converted = convert(copy.deepcopy(family), layers=layers_for(score), ratio=1.0, score=score, bypass=bypass)
    for name, value in run(converted, images).items():
        assert close(value, wanted[name]), name


def test_a_score_that_cannot_skip_most_of_a_layer_says_so(vit):
    with pytest.raises(UsageError, match=r"fewer than 0\.5 of a layer's patches, and a ratio is 0\.3"):
        convert(vit, score="energy", bypass="merge", layers={3: 0.8, 4: 0.3})


@pytest.mark.parametrize("method", ["tome", "evit", "idle"])
def test_halves_compute_what_is_left(method, images):
    """The attention sees what enters a layer, its MLP what leaves it."""
    model = convert(lively(FAMILIES["timm vit"]()), method=method, ratio=0.7)
    seen = {}
    for layer, block in enumerate(model.blocks, start=1):
        for name, module in (("attention", block.attn.proj), ("mlp", block.mlp.fc1)):
            module.register_forward_hook(lambda _, i, o, at=(layer, name): seen.setdefault(at, []).append(o.shape[1]))
    model(images)
    assert all(len(counts) == 1 for counts in seen.values()), "each half runs once"
    counts = [seen[layer, name][0] for layer in range(1, 7) for name in ("attention", "mlp")]
    if method == "idle":
        assert counts[0] == 17
        assert len(set(counts)) > 2
    else:
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] < 17


METHODS = [
    {"method": "tome"},
    {"method": "evit"},
    {"method": "idle"},
    {"method": "mctf"},
    {"method": "mctf_fast", "attention": "precise"},
    {"score": "similarity", "bypass": "merge", "schedule": "ramp"},
    {"score": "class_attention", "bypass": "borrow", "schedule": "all"},
    {"score": "random", "bypass": "persist", "schedule": "ramp"},
]


@pytest.mark.parametrize("options", METHODS, ids=str)
@pytest.mark.parametrize("name", ["timm vit", "hf ViT classifier"])
def test_copies_twins_and_batches(options, name, images):
    model = lively(FAMILIES[name]())
    keys, wanted = set(model.state_dict()), first(run(model, images))
    kinds = [type(module) for module in model.modules()]
    converted = convert(copy.deepcopy(model), **options)
    assert set(converted.state_dict()) == keys, "these methods have nothing to learn"
    found = first(run(converted, images))
    assert not torch.allclose(found, wanted, atol=1e-3)
    alone = torch.cat([first(run(converted, image[None])) for image in images])
    assert torch.allclose(alone, found, atol=1e-5)
    twin = copy.deepcopy(converted)
    run(converted, torch.zeros_like(images))
    assert torch.equal(first(run(twin, images)), found)
    back = original(converted)
    assert [type(module) for module in back.modules()] == kinds
    assert not any(module._forward_hooks for module in back.modules())
    assert torch.equal(first(run(back, images)), wanted)


def squared(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model(images).square().sum()


def squared_maps(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    maps = model.forward_intermediates(images, indices=[2, 5], output_fmt="NCHW", intermediates_only=True)
    return sum(each.square().mean() for each in maps)


@pytest.mark.parametrize("loss_of", [squared, squared_maps])
@pytest.mark.parametrize("options", METHODS, ids=str)
def test_checkpointed_gradients_are_the_same(options, loss_of, images):
    """Also where autograd goes back in a thread of its own, as it does on a GPU."""
    model = convert(lively(FAMILIES["timm vit"]()), **options)

    def gradients(checkpointing: bool, elsewhere: bool = False) -> dict:
        model.set_grad_checkpointing(checkpointing)
        model.train().zero_grad()
        loss = loss_of(model, images)
        if elsewhere:
            with ThreadPoolExecutor(1) as thread:
                thread.submit(loss.backward).result()
                left = thread.submit(lambda: selective_blocks(model)[0].selection.current.last).result()
            assert left is None, "nothing stays in that thread"
        else:
            loss.backward()
        return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}

    plain = gradients(False)
    if loss_of is squared:
        assert set(plain) == {name for name, _ in model.named_parameters()}
    for checkpointed in (gradients(True), gradients(True, elsewhere=True)):
        assert set(plain) == set(checkpointed)
        for name, value in plain.items():
            assert torch.allclose(checkpointed[name], value, atol=1e-5), name


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_saved_and_loaded_it_is_the_same(options, vit, tmp_path):
    images = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    converted = convert(vit, **options)
    wanted = converted(images)
    save(converted, tmp_path / "run")
    again = load(tmp_path / "run")
    assert torch.equal(again(images), wanted)
    assert again.tosa_config == converted.tosa_config


@pytest.mark.parametrize("bypass", ["borrow", "merge"])
def test_choosing_and_matching_are_counted_apart(bypass, vit):
    cost = flops(convert(vit, score="class_attention", bypass=bypass, layers=[4], ratio=0.5))
    layer = cost.layers[3]
    width, patches, kept = 64, 49, 25
    assert layer.selector >= (patches - kept) * kept * width  # the distances
    assert layer.macs - layer.selector < 0.6 * layer.original


def test_any_grid_is_read_from_the_image(images):
    model = lively(FAMILIES["hf Dinov2Model"]())
    convert(model, score="similarity", bypass="merge", layers=[2, 3], ratio=0.5)
    for height, width in ((32, 32), (40, 24), (8, 56)):
        model(torch.randn(1, 3, height, width))
        assert chosen_tokens(model)[3].shape[1] == 1 + math.ceil(height * width / 64 / 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tome", "bypass": "merge"}, "method 'tome' has bypass 'persist'"),
        ({"method": "tom"}, "method"),
        ({"score": "random", "bypass": "fuse"}, "fuse weighs tokens"),
        ({"score": "similarity", "selection": "per_head"}, "Eq. 4"),
        ({"schedule": "all"}, "neighbours"),
        ({"score": "class_attention", "layers": [1, 2]}, "start at 2"),
        ({"schedule": "ramp", "score": "similarity", "ratio": 0.4}, "no token at all"),
        ({"score": "random", "bypass": "persist", "layers": {2: 0.5, 4: 0.8}}, "ratios only fall"),
        ({"score": "similarity", "bypass": "persist", "layers": {2: 0.4}}, "at most half"),
        ({"layers": {2: 0.5}, "ratio": 0.5}, "leave ratio out"),
        ({"layers": {2: 1.5}}, "out of range"),
        ({"layers": {"two": 0.5}}, "layers"),
    ],
)
def test_what_does_not_fit_together_is_refused(options, message, images):
    check_refusal(options, message, images)


def test_what_a_model_has_not_got_is_refused():
    with pytest.raises(UsageError, match="needs a class token"):
        convert(FAMILIES["timm siglip"](), method="idle")
    with pytest.raises(UsageError, match="by their class token"):
        convert(FAMILIES["timm siglip"](), score="random", bypass="drop")
    post_norm = lively(FAMILIES["timm post-norm"]())
    post_norm.blocks[0].norm1.bias.data.fill_(0.1)
    with pytest.raises(TosaError, match="adds to the tokens by itself"):
        convert(post_norm, method="tome")
    model = convert(FAMILIES["timm vit"](), score="similarity", bypass="merge")
    with pytest.raises(TosaError, match="run the model from its images on"):
        model.blocks[1](torch.randn(1, 17, 48))


def test_layers_and_ratios_in_one():
    assert ConvertConfig(layers={6: 0.5, 3: 0.9}).plan(12) == [(3, 0.9), (6, 0.5)]
    assert ConvertConfig(method="tosa") == ConvertConfig(method="tosa", **{"score": "attention"})


THIRDS = {**dict.fromkeys((4, 5, 6), 0.5), **dict.fromkeys((7, 8, 9), 0.25), **dict.fromkeys((10, 11, 12), 0.125)}


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, dict.fromkeys((2, 4, 6, 8, 10), 0.8)),
        ({"score": "similarity", "schedule": "all"}, dict.fromkeys(range(1, 13), 0.8)),
        ({"score": "norm", "schedule": "all"}, dict.fromkeys(range(2, 13), 0.8)),
        ({"method": "idle", "ratio": 0.5}, THIRDS),
        ({"method": "tome", "ratio": 0.7}, {layer: 1 - 0.05 * layer for layer in range(1, 13)}),
        (
            {"score": "similarity", "schedule": "ramp", "ratio": 0.7},
            {layer: 1 - 0.05 * (layer - 0.5) for layer in range(1, 13)},
        ),
    ],
)
def test_schedules(options, wanted):
    assert dict(ConvertConfig(**options).plan(12)) == pytest.approx(wanted)


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_the_random_control_has_the_same_ratios(options, images):
    model = convert(lively(FAMILIES["timm vit"]()), **options)
    control = random_control(model)
    plan, theirs = dict(model.tosa_config.plan(6)), dict(control.tosa_config.plan(6))
    assert {layer: ratio for layer, ratio in plan.items() if layer in theirs} == theirs
    assert set(plan) - set(theirs) <= {1}
    assert control.tosa_config.score == "random"
    assert first(run(control, images)).shape == first(run(model, images)).shape
    assert torch.equal(control.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("options", [{"method": "tome"}, {"score": "class_attention", "bypass": "drop", "layers": [4]}])
def test_converted_models_are_finetuned(options, vit, labelled):
    settings = FinetuneSettings(steps=1, batch_size=2)
    assert finetune(convert(vit, **options), labelled, settings)["steps"] == 1


def test_features_cannot_be_learnt_from_tokens_that_are_gone(vit, labelled):
    model = convert(vit, score="random", bypass="drop", layers=[4])
    with pytest.raises(UsageError, match="set features to 0"):
        finetune(model, labelled, FinetuneSettings(steps=1, features=1.0))
