"""The parts of timm's training script: schedules, learning rates by layer, averages, mixing, stochastic depth."""

import functools
import math
import warnings

import pytest
import torch
from conftest import check_resuming
from families import FAMILIES
from pydantic import ValidationError
from timm.layers import DropPath
from timm.optim import param_groups_weight_decay

from tosa_convert import FinetuneSettings, UsageError, convert, evaluate, finetune, load
from tosa_convert.base.errors import TosaWarning
from tosa_convert.data.images import Augmentation, Draws, Images
from tosa_convert.models.adapter import adapter_of
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.tasks.classification import Classification
from tosa_convert.training import engine
from tosa_convert.training.optimisation import drop_path, layer_scales, make_optimizer, make_schedule

EVERYTHING = {
    "mixup": 0.8,
    "cutmix": 1.0,
    "smoothing": 0.1,
    "aa": "rand-m9-mstd0.5-inc1",
    "reprob": 0.25,
    "aug_repeats": 2,
    "drop_path": 0.2,
    "layer_decay": 0.8,
    "model_ema_decay": 0.9,
    "sched": "step",
    "opt": "lamb",
}


def converted(**options):
    return convert(
        load("quickstart"), **{"score": "similarity", "bypass": "merge", "layers": [3], "ratio": 0.5, **options}
    )


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("sched", ["cosine", "poly", "step", "tanh"])
def test_the_learning_rate_rises_evenly_and_falls_as_timm_says(sched):
    settings = FinetuneSettings(lr=0.5, warmup=0.2, sched=sched)
    optimizer = make_optimizer(torch.nn.Linear(2, 2), settings)
    schedule, found = make_schedule(optimizer, settings, 50), []
    for step in range(50):
        schedule(step)
        found.append(optimizer.param_groups[0]["lr"])
    assert found[:10] == pytest.approx([0.5 * (step + 1) / 11 for step in range(10)])
    shares = [(step - 10) / 40 for step in range(10, 50)]
    if sched == "cosine":
        assert found[10:] == pytest.approx([0.25 * (1 + math.cos(math.pi * share)) for share in shares])
    if sched == "poly":
        assert found[10:] == pytest.approx([0.5 * (1 - share) for share in shares])
    if sched == "step":
        assert sorted({round(lr, 6) for lr in found[10:]}) == [0.005, 0.05, 0.5]
    assert found[10:] == sorted(found[10:], reverse=True)
    make_schedule(optimizer, FinetuneSettings(lr=0.5, warmup=0.0, sched=sched), 50)(0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5, rel=1e-5)


def test_layers_of_windows_learn_as_the_layer_before_them():
    model = FAMILIES["timm sam"]()
    chosen, scales = {id(block) for block in adapter_of(model).blocks}, layer_scales(model, 0.5)
    rates = [(id(block) in chosen, {scales[parameter] for parameter in block.parameters()}) for block in model.blocks]
    assert {whole for whole, _ in rates} == {True, False}
    before = {0.5 ** (len(chosen) + 1)}
    for whole, found in rates:
        before = {2 * rate for rate in before} if whole else before
        assert found == before


@pytest.mark.parametrize("name", ["timm vit", "hf ViT classifier", "timm eva02"])
def test_learning_rates_fall_from_layer_to_layer(name):
    model = FAMILIES[name]()
    adapter, scales = adapter_of(model), layer_scales(model, 0.5)
    depth = len(adapter.blocks)
    assert set(scales) == set(model.parameters())
    for index, block in enumerate(adapter.blocks):
        assert {scales[parameter] for parameter in block.parameters()} == {0.5 ** (depth - index)}
    assert {scales[parameter] for parameter in adapter.patch_projection.parameters()} == {0.5 ** (depth + 1)}
    heads = [
        each for name, each in model.named_parameters() if name.startswith(("head", "classifier", "norm", "layernorm"))
    ]
    assert {scales[parameter] for parameter in heads if scales[parameter] == 1.0} == {1.0}
    optimizer = make_optimizer(model, FinetuneSettings(lr=1.0), scales)
    make_schedule(optimizer, FinetuneSettings(lr=1.0, warmup=0.0), 100)(1)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(group["lr_scale"], rel=1e-2)


def test_layers_are_dropped_while_training_only():
    model = FAMILIES["timm vit"]()
    with drop_path(adapter_of(model), 0.5):
        rates = [block.drop_path1.drop_prob for block in model.blocks]
        assert rates == pytest.approx([0.5 * index / 5 for index in range(6)])
        images = torch.randn(8, 3, 32, 32)
        assert not torch.equal(model.train()(images), model(images))
        assert torch.equal(model.eval()(images), model(images))
    assert not any(isinstance(module, DropPath) for module in model.modules())
    none = adapter_of(FAMILIES["hf CLIPModel"]())
    with pytest.raises(UsageError, match="no stochastic depth, so leave drop_path out"), drop_path(none, 0.5):
        pass


def test_each_image_comes_several_times_in_a_row():
    draws = [index for _, index in Draws(10, 0, 20, seed=3, repeats=2)]
    for start in (0, 10):
        assert draws[start : start + 10 : 2] == draws[start + 1 : start + 10 : 2]
        assert len(set(draws[start : start + 10])) == 5
    assert [index for _, index in Draws(10, 7, 20, seed=3, repeats=2)] == draws[7:]


def test_crops_take_what_timm_offers(photos):
    plain, asked = (
        Images(photos, preprocessing_of(FAMILIES["timm vit"]()), Augmentation("crop", **options))
        for options in ({}, {"scale": (0.08, 1.0), "aa": "rand-m9-mstd0.5-inc1", "reprob": 1.0})
    )
    names = [type(step).__name__ for step in asked.transform.transforms]
    assert {"RandAugment", "RandomErasing"} <= set(names)
    assert not {"RandAugment", "RandomErasing"} & {type(step).__name__ for step in plain.transform.transforms}
    assert not torch.equal(plain[0, 0][0], asked[0, 0][0])


def test_what_is_kept_is_the_average(labelled, monkeypatch):
    """By a loop over the weights after each step."""
    model, seen = converted(), []
    note = engine._Recorder.note

    def watch(self, step, *args, **kwargs):
        seen.append(state(model))
        note(self, step, *args, **kwargs)

    monkeypatch.setattr(engine._Recorder, "note", watch)
    start = state(model)
    finetune(model, labelled, FinetuneSettings(steps=4, batch_size=4, lr=1e-3, model_ema_decay=0.4))
    name = "blocks.0.attn.qkv.weight"
    average = start[name]
    for step, weights in enumerate(seen, start=1):
        rising = 0.0 if step < 2 else 1 - step ** (-2 / 3)  # the average forgets the beginning
        decay = min(rising, 0.4)
        average = decay * average + (1 - decay) * weights[name]
    assert torch.allclose(model.state_dict()[name], average, atol=1e-6)
    assert not torch.allclose(model.state_dict()[name], seen[-1][name], atol=1e-7)


def test_all_of_it_together_is_seeded_and_resumes(labelled, tmp_path, monkeypatch):
    settings = FinetuneSettings(steps=6, batch_size=4, log_every=1, checkpoint_minutes=1e-9, **EVERYTHING)
    train = functools.partial(finetune, data=labelled, settings=settings, seed=5)
    whole = check_resuming(train, converted, tmp_path, monkeypatch)
    assert evaluate(whole, labelled)["models"]["model"]["top1"] >= 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_ema_decay": 1.0}, "less than 1"),
        ({"mixup": 0.8, "batch_size": 3}, "give an even batch_size, not 3"),
        ({"aa": "rand-m9", "augment": "flip"}, "go with augment crop, not flip"),
        ({"scale": (1.0, 0.1)}, "the least and the largest"),
        ({"sched": "wiggly"}, "cosine"),
        ({"layer_decay": 0.0}, "greater than 0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        FinetuneSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixup": 0.8}, "mix labels of classes, and there are none to learn from"),
        ({"aa": "rand-m9-foo"}, r"'rand-m9-foo' is not understood by timm \(foo has no number\)"),
        ({"opt": "adamww"}, r"timm has no optimiser 'adamww'; did you mean 'adamw'\?"),
        ({"drop_path": 0.1}, None),
    ],
)
def test_what_cannot_be_had_is_refused_before_the_first_step(settings, message, photos):
    model = converted()
    before = state(model)
    if message is None:
        finetune(model, photos, FinetuneSettings(steps=1, batch_size=2, **settings))
        assert not any(isinstance(module, DropPath) for module in model.modules())
        return
    with pytest.raises(UsageError, match=message):
        finetune(model, photos, FinetuneSettings(steps=1, **settings))
    assert same(before, state(model))


def test_the_smoothing_of_an_older_recipe_is_understood():
    assert FinetuneSettings(label_smoothing=0.1).smoothing == 0.1


def test_a_soft_label_counts_as_one():
    logits, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    hard = Classification().loss(logits, labels, FinetuneSettings(smoothing=0.0))
    soft = Classification().loss(logits, torch.eye(5)[labels], FinetuneSettings(smoothing=0.3))
    assert hard.item() == pytest.approx(soft.item())


def test_a_temperature_of_nothing_is_said(labelled):
    """With labels the original's logits weigh nothing."""
    settings = FinetuneSettings(steps=1, batch_size=2, augment="none", temperature=2.0)
    with pytest.warns(TosaWarning, match="temperature .* changes nothing; give logits a weight"):
        finetune(converted(), labelled, settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TosaWarning)
        finetune(converted(), labelled, settings.model_copy(update={"logits": 1.0}))


@pytest.mark.parametrize("name", ["smoothing", "scale", "rotate"])
def test_a_setting_that_changes_nothing_is_said(name, photos):
    asked = {"smoothing": 0.1} if name == "smoothing" else {"scale": [0.1, 1.0]} if name == "scale" else {"rotate": 5.0}
    settings = FinetuneSettings(steps=1, batch_size=2, augment="flip", **asked)
    with pytest.warns(TosaWarning, match=f"{name} is of .* so it changes nothing"):
        finetune(converted(), photos, settings)


@pytest.mark.parametrize("name", ["timm vit", "timm deit distilled", "timm beit", "timm eva02"])
def test_weight_decay_is_for_what_timm_lets_decay(name):
    model = FAMILIES[name]()
    optimizer = make_optimizer(model, FinetuneSettings(weight_decay=0.1))
    decayed = {value for group in optimizer.param_groups if group["weight_decay"] for value in group["params"]}
    theirs = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    assert decayed == {value for group in theirs if group["weight_decay"] for value in group["params"]}


def test_position_embeddings_of_transformers_do_not_decay():
    model = FAMILIES["hf CLIPVisionModel"]()
    optimizer = make_optimizer(model, FinetuneSettings(weight_decay=0.1))
    spared = {value for group in optimizer.param_groups if not group["weight_decay"] for value in group["params"]}
    named = {name for name, value in model.named_parameters() if value in spared and value.ndim > 1}
    assert any("position_embedding" in name for name in named)
    assert not any("proj" in name or "fc" in name for name in named)
