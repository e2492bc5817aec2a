"""Thresholds: each image of a batch keeps as many tokens as it needs, and is computed as if it were alone."""

import copy
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from conftest import LAYERS, lively
from families import CORE, FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from test_bypasses import AROUND
from test_contract import _mask, close, first
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tosa_convert import TosaError, UsageError, convert, evaluate, find_plan, flops, load, save
from tosa_convert.export.graph import write_graph
from tosa_convert.export.onnx import export_onnx
from tosa_convert.measure.evaluation import random_control
from tosa_convert.measure.macs_share import MacsShare
from tosa_convert.methods.packing import by_image, choose_above, match_in_row
from tosa_convert.methods.parts import every
from tosa_convert.methods.score import Acts, Score
from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.planning import adaptive as planning
from tosa_convert.planning import plan as plans
from tosa_convert.planning import rivals
from tosa_convert.planning.budget import at_budget
from tosa_convert.selective import packed
from tosa_convert.selective.containers import Containers, packed_into
from tosa_convert.selective.conversion import original
from tosa_convert.selective.selection import chosen_tokens, last_choices, selective_blocks

ATTEND = Containers.attend
SCORES = [name for name, part in every(Score).items() if part.suits(Acts.AROUND)]


def photos(count: int = 4, side: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))


def at_the_middle(model: nn.Module, images: torch.Tensor, **parts) -> nn.Module:
    """Converted, with thresholds between the values that these images have in each layer."""
    converted = convert(model, **{"layers": LAYERS, "score": "similarity", "threshold": 0.0, **parts})
    for block in selective_blocks(converted):
        block.selection.threshold_for = _Middle(block.selection)
    with torch.no_grad():
        run(converted, images)
    for block in selective_blocks(converted):
        del block.selection.threshold_for
    return converted


class _Middle:
    def __init__(self, selection):
        self.selection = selection

    def __call__(self, worth):
        values = worth[:, self.selection.prefix :].flatten()
        values = values[values.isfinite()].sort().values
        middle = values[len(values) // 3 : 2 * len(values) // 3]
        widest = middle.diff().argmax()  # where rounding turns no choice
        self.selection.threshold = (middle[widest] + middle[widest + 1]).item() / 2
        return self.selection.threshold


def counts(model: nn.Module) -> set[int]:
    return {len(tokens) for layer in chosen_tokens(model).values() for tokens in layer}


PADDED = mock.patch.object(packed, "_padding", return_value=5)
"""Rows are longer than their images."""


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return lively(FAMILIES[name]())


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_equals_its_images_one_at_a_time(name):
    images = photos(3)
    converted = at_the_middle(built(name), images, bypass="merge")
    found = run(converted, images)
    assert len(counts(converted)) > 1, "images keep different numbers of tokens"
    turned = run(converted, images.flip(0))
    with PADDED:
        longer = run(converted, images)
    for output, value in found.items():
        alone = torch.cat([run(converted, image[None])[output] for image in images])
        assert close(value, alone), output
        assert close(value.flip(0), turned[output]), output
        assert close(value, longer[output]), output


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_skipped_tokens_are_masked_out_of_the_original(name):
    model, images = built(name), photos()
    converted = at_the_middle(copy.deepcopy(model), images, bypass="identity")
    found = run(converted, images)
    reference = copy.deepcopy(model)
    for layer, tokens in chosen_tokens(converted).items():
        longest = max(map(len, tokens))
        same = [torch.cat([each, each[:1].expand(longest - len(each))]) for each in tokens]
        _mask(adapter_of(reference), layer, torch.stack(same))
    for output, value in run(reference, images).items():
        assert close(found[output], value), output


@pytest.mark.parametrize("bypass", AROUND)
@pytest.mark.parametrize("score", SCORES)
def test_every_score_takes_a_threshold(score, bypass):
    images, model = photos(), built("timm vit")
    layers = LAYERS if every(Score)[score].ordinary_before else [2, 3, 5]
    converted = at_the_middle(model, images, score=score, bypass=bypass, layers=layers)
    with torch.no_grad():
        together = first(run(converted, images))
        kept = [len(tokens) for tokens in chosen_tokens(converted)[layers[-1]]]
        alone = torch.cat([first(run(converted, image[None])) for image in images])
        with PADDED:
            longer = first(run(converted, images))
    assert close(together, alone)
    assert close(together, longer)
    assert max(kept) < 17, "some are skipped"


@pytest.mark.parametrize("segment", [1, 3])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_those_of_single_images(training, segment):
    images = photos()
    model = at_the_middle(built("timm vit"), images, bypass="merge", layers=[2, 3, 4], segment=segment)
    model.train(training)

    def gradients(batches) -> list[torch.Tensor]:
        model.zero_grad()
        for batch in batches:
            first(run(model, batch)).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    together, apart = gradients([images]), gradients(images.split(1))
    model.set_grad_checkpointing(True)
    again = gradients([images])
    with PADDED:
        longer = gradients([images])
    assert len(together) == len(apart) == len(again) == len(longer)
    for ours, theirs, recomputed, padded in zip(together, apart, again, longer, strict=True):
        assert torch.allclose(ours, padded, atol=1e-5 * theirs.abs().max().item())
        assert torch.allclose(ours, theirs, atol=1e-4 * theirs.abs().max().item())
        assert torch.allclose(ours, recomputed, atol=1e-5 * theirs.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("half", [False, True])
def test_half_precision_on_a_cpu_meets_few_lengths_of_rows(half):
    """Each new one is prepared anew, and kept."""
    images = photos(40)
    model = at_the_middle(built("timm vit"), images, bypass="identity")
    met = set()
    for block in selective_blocks(model):
        block.mlp.fc1.register_forward_hook(lambda module, inputs, output: met.add(output.shape[1]))
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        for count in range(30, 41):
            run(model, images[:count])
    assert all(length % (1 << length.bit_length() - 6) == 0 for length in met) == half
    assert max(met) > 256


def test_stochastic_depth_leaves_out_images_not_batches():
    images = photos(8)
    plain = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=6, num_heads=3)
    model = at_the_middle(lively(plain), images)
    from timm.layers import DropPath

    for block in selective_blocks(model):
        block.drop_path1, block.drop_path2 = DropPath(0.5), DropPath(0.5)
    model.train()
    torch.manual_seed(0)
    tokens: dict = {}
    block = selective_blocks(model)[0]
    block.register_forward_hook(lambda _, given, output: tokens.update(before=given[0], after=output))
    run(model, images)
    left_out = (tokens["after"] == tokens["before"]).all(2).all(1)
    assert 0 < left_out.sum() < len(images)


QUICK = ("timm vit",)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in CORE]
)
def test_the_file_keeps_as_many_tokens_as_torch_does(name, tmp_path):
    images = photos()
    converted = at_the_middle(built(name), images, bypass="merge")
    check = export_onnx(converted, tmp_path)
    assert check.passed
    assert set(check.selected) == set(LAYERS)
    assert min(check.selected.values()) > 0.9


@given(
    seed=st.integers(0, 1000),
    batch=st.integers(1, 4),
    patches=st.integers(1, 12),
    prefix=st.integers(0, 2),
    most=st.none() | st.integers(1, 12),
    threshold=st.floats(-3, 3),
)
def test_a_choice_above_a_threshold(seed, batch, patches, prefix, most, threshold):
    scores = torch.randn(batch, prefix + patches, generator=torch.Generator().manual_seed(seed))
    most = patches if most is None else min(most, patches)
    choice = choose_above(scores, prefix, threshold, None if most == patches else most)
    everyone = torch.cat([choice.attended, choice.skipped], 1)[0]
    assert sorted(everyone.tolist()) == list(range(scores.numel())), "each token attends or is skipped"
    for values, tokens in zip(scores, by_image(choice), strict=True):
        assert tokens.tolist() == sorted(tokens.tolist())
        assert tokens[:prefix].tolist() == list(range(prefix))
        mine, own = tokens[prefix:], values[prefix:]
        assert 1 <= len(mine) <= most
        wanted = (own >= threshold).sum().clamp(1, most)
        assert len(mine) == wanted
        assert set(mine.tolist()) == set((own.argsort(descending=True)[:wanted] + prefix).tolist())


@given(seed=st.integers(0, 1000), batch=st.integers(1, 4), prefix=st.integers(0, 2))
def test_partners_are_the_nearest_of_the_same_image(seed, batch, prefix):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, prefix + 9, 5, generator=generator)
    choice = choose_above(torch.randn(batch, prefix + 9, generator=generator), prefix, 0.0, 9)
    choice = match_in_row(features, prefix, choice)
    flat, count = features.flatten(0, 1), prefix + 9
    for skipped, partner in zip(choice.skipped[0].tolist(), choice.partners[0].tolist(), strict=True):
        mine = [token for token in choice.attended[0].tolist() if token // count == skipped // count]
        mine = [token for token in mine if token % count >= prefix]
        nearest = min(mine, key=lambda token: (flat[token] - flat[skipped]).square().sum().item())
        assert choice.attended[0, partner] == nearest


@pytest.mark.parametrize("name", ["timm vit", "timm dinov2 registers"])
@pytest.mark.parametrize("container", [1, 24, 1000])
def test_containers_give_what_images_give_by_themselves(name, container):
    images = photos(5)
    parts = {"score": "similarity", "bypass": "identity"}
    plain = at_the_middle(lively(FAMILIES[name]()), images, **parts)
    thresholds = [block.selection.threshold for block in selective_blocks(plain)]
    contained = convert(original(plain), layers=LAYERS, threshold=thresholds, container=container, **parts)
    assert len(counts(plain)) > 1
    asked = []
    with mock.patch.object(Containers, "attend", lambda *args, **more: asked.append(1) or ATTEND(*args, **more)):
        assert close(first(run(contained, images)), first(run(plain, images)))
        with PADDED:
            assert close(first(run(contained, images)), first(run(plain, images)))
    assert len(asked) == 2 * len(LAYERS)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 60))
def test_containers_hold_every_image_whole_and_no_more_than_fits(lengths, size):
    containers = packed_into(tuple(lengths), size)
    assert sorted(image for group in containers for image in group) == list(range(len(lengths)))
    size = max(size, *lengths)
    assert all(sum(lengths[image] for image in group) <= size for group in containers)
    assert sum(sum(lengths[image] for image in group) <= size / 2 for group in containers) <= 1  # they would share one


@given(
    st.integers(0, 999),
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.integers(1, 20),
    st.sampled_from([0, 1, 2]),
)
def test_containers_take_what_is_added_to_the_logits(seed, lengths, size, kind):
    """Nothing, of each key, or of each query and key and head."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    qkv = [torch.randn(1, 2, total, 4, generator=generator) for _ in range(3)]
    mask = [
        None,
        torch.randn(1, 1, 1, total, generator=generator),
        torch.randn(1, 2, total, total, generator=generator),
    ][kind]
    found = Containers(tuple(lengths), size, torch.device("cpu")).attend(*qkv, mask)
    image = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    apart = torch.zeros(total, total).masked_fill(image[:, None] != image, float("-inf"))
    wanted = torch.nn.functional.scaled_dot_product_attention(*qkv, apart if mask is None else apart + mask)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_a_row_that_does_not_fit_says_how_long_it_is(monkeypatch):
    model = at_the_middle(built("timm vit"), photos(), bypass="identity")

    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(model.blocks[1].mlp, "forward", full)
    with pytest.raises(TosaError, match=r"4 images make a row of \d+ tokens of 48 channels.*--batch-size"):
        run(model, photos())


def test_no_image_loses_all_its_tokens():
    converted = convert(built("timm vit"), score="norm", threshold=1e9, layers=LAYERS)
    run(converted, photos())
    assert counts(converted) == {2}, "the class token and one patch"


def test_a_threshold_that_keeps_all_is_the_original(vit):
    images = photos(2, 28)[:, :1]
    wanted = first(run(vit, images))
    converted = convert(copy.deepcopy(vit), score="norm", bypass="merge", threshold=-1e9, layers=[2, 3])
    assert close(first(run(converted, images)), wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bypass": "drop", "score": "class_attention"}, "takes a number of tokens, not a threshold"),
        ({"selection": "per_head"}, "takes a number of tokens"),
        ({"threshold": [1.0, 2.0], "layers": [2, 4, 6]}, "2 thresholds for 3 selective layers"),
        ({"threshold": [1.0, 2.0]}, "2 thresholds for layers that are not named"),
        ({"threshold": float("nan")}, "out of range"),
        ({"threshold": "high"}, "threshold"),
    ],
)
def test_thresholds_that_make_no_sense(options, message):
    with pytest.raises(UsageError, match=message):
        convert(built("timm vit"), **{"threshold": 1.0, **options})


@pytest.fixture(scope="module")
def small():
    model = lively(VisionTransformer(img_size=64, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=5))
    images = torch.randn(9, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for place, image in enumerate(images):
        image[:, :, 16 + 6 * place :] = 0.1  # more or less of it is empty
    return model, images


@pytest.fixture(scope="module")
def adaptive(small):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "ahead", lambda *_: True)  # with random weights nothing is
        return find_plan(*small, 0.8, adaptive=True, max_macs=0.9)


def test_without_a_clear_gain_a_plan_keeps_its_numbers(small):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "ahead", lambda *_: False)
        patch.setattr(rivals, "lasting", lambda _: ["tome"])
        found = find_plan(*small, 0.8, adaptive=True)
        assert found.config == find_plan(*small, 0.8).config
    assert found.spread is None
    assert "as many tokens as each image needs" in found.rivals


def test_an_adaptive_plan_keeps_its_budget_on_average_and_its_bound_for_each(small, adaptive):
    model, images = small
    converted = convert(copy.deepcopy(model), adaptive.config)
    cost = flops(converted, images=images)
    shares = MacsShare(model).of_each(converted, images)
    assert cost.images == len(images)
    assert cost.least < cost.macs < cost.most
    assert cost.macs / cost.original == pytest.approx(sum(shares) / len(shares), rel=1e-4)
    assert 0.77 < adaptive.spread.mean <= 0.8
    assert adaptive.spread.mean == pytest.approx(sum(shares) / len(shares), rel=1e-6)
    assert adaptive.spread.most == pytest.approx(max(shares), rel=1e-6)
    assert max(shares) <= adaptive.spread.bound <= 0.9
    everything = convert(copy.deepcopy(model), **{**adaptive.config.model_dump(), "threshold": -1e30})
    assert MacsShare(model).of_each(everything, images[:1])[0] == pytest.approx(adaptive.spread.bound, rel=1e-6)


def test_an_adaptive_plan_is_the_same_again(small, adaptive, monkeypatch):
    monkeypatch.setattr(planning, "ahead", lambda *_: True)
    assert find_plan(*small, 0.8, adaptive=True, max_macs=0.9).config == adaptive.config


@pytest.mark.parametrize(
    ("options", "count", "message"),
    [
        ({"adaptive": True}, 2, "from 2 of them it cannot be seen"),
        ({"adaptive": True, "max_macs": 0.7}, 9, "raise --max-macs"),
        ({"adaptive": True, "max_macs": 1.5}, 9, "1.5 is out of range"),
        ({"max_macs": 0.9}, 9, "give adaptive too"),
    ],
)
def test_adaptive_plans_that_make_no_sense(small, options, count, message):
    with pytest.raises(UsageError, match=message):
        find_plan(small[0], small[1][:count], 0.8, **options)


def test_multiply_adds_need_images(small, adaptive):
    converted = convert(copy.deepcopy(small[0]), adaptive.config)
    with pytest.raises(UsageError, match="depend on the images"):
        flops(converted)


def test_thresholds_that_do_not_come_down_leave_the_plan_with_numbers(small, monkeypatch):
    def refuse(*_):
        raise UsageError("no")

    monkeypatch.setattr(rivals, "lasting", lambda _: ["tome"])
    monkeypatch.setattr(planning._Thresholds, "at", refuse)
    assert find_plan(*small, 0.8, adaptive=True).spread is None


def test_an_adaptive_plan_is_held_to_published_methods(small, monkeypatch):
    """Thresholds have to be ahead of them too, where they are ahead of the plan with numbers."""
    compared = []
    tome = at_budget(small[0], "tome", 0.8).tosa_config
    monkeypatch.setattr(planning, "ahead", lambda _, others: compared.append(others) is not None)
    for other in ({}, {"config": tome}):
        monkeypatch.setattr(plans, "against_published", lambda _, plan, *__, other=other: replace(plan, **other))
        found = find_plan(*small, 0.8, adaptive=True)
    assert found.config == tome
    assert not torch.allclose(*compared)


def test_a_bound_on_the_tokens_of_an_image_holds_at_any_size(tmp_path):
    converted = convert(built("timm vit"), score="norm", layers=[2, 4], threshold=-1e9, ratio=0.5)
    write_graph(converted, tmp_path / "model.onnx", 20, any_size=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for size in (32, 48):
        pictures = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(2))
        with torch.no_grad(), adapter_of(converted).any_size():
            wanted = first(run(converted, pictures))
        found = session.run(None, {session.get_inputs()[0].name: pictures.numpy()})[0]
        assert np.allclose(found, wanted.numpy(), atol=1e-4)
        assert len(last_choices(converted)[2].attended[0]) == 1 + (size // 8) ** 2 // 2


def test_the_control_keeps_as_many_tokens(small):
    model, images = small
    converted = at_the_middle(copy.deepcopy(model), images, layers=[2, 3])
    control = random_control(converted, seed=1)
    run(converted, images), run(control, images)
    ours, theirs = (last_choices(each)[2] for each in (converted, control))
    assert ours.packed.lengths == theirs.packed.lengths
    assert not torch.equal(ours.attended, theirs.attended)
    assert (
        evaluate({"converted": converted, "control": control}, reference="converted")["models"]["control"]["cosine"] < 1
    )


def test_eval_says_that_a_threshold_saves_nothing(tosa, labelled):
    save(convert(load("quickstart"), score="norm", bypass="borrow", layers=[2, 4], threshold=-1000.0), "run")
    code, out, err = tosa("eval", "run", "--data", labelled, "--no-labels")
    assert code == 0, err
    assert "saves nothing on any of these images; raise it" in " ".join(out.split())


def test_an_adaptive_plan_by_command(tosa, labelled, monkeypatch):
    """Its table says what single images take; so do show, flops and eval, which compares with the images at hand."""
    monkeypatch.setattr(planning, "ahead", lambda *_: True)
    monkeypatch.setattr(rivals, "lasting", lambda _: [])
    code, out, err = tosa("plan", "quickstart", "--adaptive", "--images", 4, "--data", labelled, "--out", "plan")
    assert code == 0, err
    assert "MACs of single images" in out
    assert "MACs of any image, at most" in out
    recipe = yaml.safe_load(Path("plan/plan.yaml").read_text())
    del recipe["export"]  # which takes a minute
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert tosa("run", "recipe.yaml", "--out", "run")[0] == 0
    code, out, err = tosa("eval", "run/convert", "--data", labelled, "--no-labels")
    assert code == 0, err
    assert "of the original on average" in " ".join(out.split())
    code, out, err = tosa("show", "run/convert", "--image", next(labelled.rglob("*.png")), "--out", "show.png")
    assert code == 0, err
    assert "MACs" in out + err
