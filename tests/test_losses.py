"""Parts of the loss: which can be had, and what IdleViT's token cut is."""

import copy
import itertools

import pytest
import torch
from conftest import FAMILIES, lively
from training_models import converted

from tosa_convert import FinetuneSettings, UsageError, convert, finetune, load, original
from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.selective.selection import chosen_tokens
from tosa_convert.training.loss import Situation
from tosa_convert.training.losses.cut import TokenCut


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": 1.0}, "has no labels"),
        ({"labels": 0.0, "logits": 0.0, "features": 0.0}, "nothing to learn"),
        ({"cut": 1.0}, "token cut loss is for scores class_query and class_attention"),
    ],
)
def test_losses_that_cannot_be_had_are_refused(settings, message, photos):
    with pytest.raises(UsageError, match=message):
        finetune(converted(), photos, FinetuneSettings(steps=1, **settings))


def test_idle_learns_to_select_what_belongs_together(photos):
    model = convert(load("quickstart"), method="idle", ratio=0.6)
    settings = {"batch_size": 8, "augment": "none", "logits": 0.0, "features": 1e-6}
    first = finetune(model, photos, FinetuneSettings(steps=1, lr=1e-9, **settings))
    last = finetune(model, photos, FinetuneSettings(steps=15, lr=1e-3, **settings))
    assert 0 < last["cut"] < 0.95 * first["cut"] < 2
    assert "cut" not in finetune(model, photos, FinetuneSettings(steps=1, cut=0.0))
    partly = convert(load("quickstart"), method="idle", layers=[2, 3], ratio=[1.0, 0.6])
    assert 0 < finetune(partly, photos, FinetuneSettings(steps=1, **settings))["cut"] < 2, "of the layer that selects"


@pytest.mark.parametrize("name", ["timm vit", "hf ViT classifier"])
def test_the_token_cut_is_the_attention_that_crosses(name):
    """Written out for a layer after a selective one: its attention among all of its tokens, the idle ones too."""
    model = convert(lively(FAMILIES[name]()), method="idle", ratio=0.6)
    adapter, images = adapter_of(model), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    cut = TokenCut(model, None, FinetuneSettings())
    side = next(side for side in cut.sides if side.selection.layer == 4)
    cut.begin(images)
    entering, seen, twin = [], {}, original(model)
    handle = adapter.blocks[2].register_forward_hook(lambda block, inputs, output: entering.append(output))
    run(model, images)
    handle.remove()
    tap = adapter_of(twin).tap(adapter_of(twin).blocks[3], lambda queries, keys: seen.update(q=queries, k=keys))
    adapter_of(twin).blocks[3](entering[0].detach())
    tap.remove()
    chosen, values = chosen_tokens(model)[4], []
    for image in range(2):
        maps = (seen["q"][image] @ seen["k"][image].mT / seen["k"].shape[-1] ** 0.5).softmax(-1).mean(0)
        selected = set(chosen[image].tolist())
        crossing, all_edges = {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}
        for row, column in itertools.product(range(1, 17), repeat=2):
            weight, crosses = maps[row, column].item(), (row in selected) != (column in selected)
            all_edges[row in selected] += weight
            crossing[row in selected] += crosses * weight
        values.append(sum(crossing[side] / all_edges[side] for side in (True, False)))
    assert side.loss().item() == pytest.approx(sum(values) / 2, rel=1e-4)
    cut.begin(images)
    run(model, images)
    cut.of({}, {}, None).backward()
    assert model.get_parameter(
        next(n for n, _ in model.named_parameters() if "patch" in n and "weight" in n)
    ).grad.any()
    cut.close()
    assert not any(block._forward_pre_hooks for block in adapter.blocks)


ROTARY = ("timm eva02", "timm dinov3", "timm mixed rope", "hf DINOv3ViTModel", "hf MLCDVisionModel")


@pytest.mark.parametrize("name", [*ROTARY, "timm beit", "timm qk-norm", "hf Dinov2 registers"])
@pytest.mark.parametrize("score", ["class_query", "class_attention"])
def test_looking_for_the_cut_changes_nothing(name, score):
    """Found: taps of the layers behind listened to it."""
    model = convert(lively(FAMILIES[name]()), score=score, schedule="all", ratio=0.6)
    images = torch.randn(2, 3, *adapter_of(model).preprocessing().size, generator=torch.Generator().manual_seed(0))
    wanted = next(iter(run(model, images).values()))
    cut = TokenCut(model, None, FinetuneSettings())
    cut.begin(images)
    assert torch.equal(next(iter(run(model, images).values())), wanted)
    assert 0 < cut.of({}, {}, None).item() < 2
    run(model, images)
    copy.deepcopy(model)  # no map is kept of a forward pass that is no step
    cut.close()


@pytest.mark.parametrize(("head_only", "weight"), [(False, 1.0), (True, 0.0)])
def test_no_cut_where_the_head_alone_learns(head_only, weight):
    model = convert(load("quickstart"), method="idle", ratio=0.6)
    settings = FinetuneSettings(head_only=head_only)
    assert TokenCut.weight(Situation(settings, None, model, 10, None)) == weight
