"""Layers that share a choice: what goes on from one to the next, what users may ask for, what a plan makes of it."""

import copy

import pytest
import torch
from conftest import lively
from families import FAMILIES, SMALL
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

from tosa_convert import ConvertConfig, TosaError, UsageError, convert, find_plan, original
from tosa_convert.base.progress import Progress
from tosa_convert.measure.evaluation import random_control
from tosa_convert.measure.macs_share import MacsShare
from tosa_convert.methods.bypasses.merge import Merge
from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.planning.allocation import Allocation, bent_ramp, nudged
from tosa_convert.planning.cost_model import Conditions, price
from tosa_convert.selective.conversion import make_config, set_ratios
from tosa_convert.selective.selection import chosen_tokens, selective_blocks

MERGE = {"score": "similarity", "bypass": "merge", "schedule": "all", "ratio": 0.5}


def made(**options):
    torch.manual_seed(0)
    return convert(lively(FAMILIES["timm vit"]()).eval(), **{**MERGE, **options})


def photos(count=2) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_choice_is_made_once_and_serves_the_segment():
    model, chosen = made(segment=[1, 2, 3]), []
    for block in selective_blocks(model):
        if block.selector is not None:
            block.selector.register_forward_hook(lambda *_, layer=block.selection.layer: chosen.append(layer))
    run(model, photos())
    assert chosen == [1, 2, 4]
    tokens = chosen_tokens(model)
    assert torch.equal(tokens[2], tokens[3])
    assert torch.equal(tokens[4], tokens[6])
    assert not torch.equal(tokens[3], tokens[4])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("bypass", ["borrow", "merge"])
@pytest.mark.parametrize("change", ["none", "a copy", "in place", "other tokens"])
def test_the_groups_go_on_unless_the_tokens_have_changed(bypass, change, mode):
    """They then are what the changed tokens form."""
    with mode():
        check_changed(bypass, change)


def check_changed(bypass, change):
    model = made(bypass=bypass, segment=3)
    hooks = {
        "none": lambda module, inputs, output: None,
        "a copy": lambda module, inputs, output: output.clone(),
        "in place": lambda module, inputs, output: output.add_(torch.sin(torch.arange(output.shape[2]))),
        "other tokens": lambda module, inputs, output: 1.5 * output,
    }
    plain = model.forward_features(photos())
    adapter_of(model).blocks[1].register_forward_hook(hooks[change])
    seen = []
    adapter_of(model).blocks[2].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    found = model.forward_features(photos())
    if change in ("none", "a copy"):
        assert torch.allclose(found, plain, atol=1e-5)
        return
    assert not torch.allclose(found, plain, atol=1e-2)
    # Wherever the tokens come from: the same as layers that have to form their groups anew.
    again = made(bypass=bypass, segment=3)
    adapter_of(again).blocks[1].register_forward_hook(lambda module, inputs, output: seen[0].clone())
    assert torch.allclose(found, again.forward_features(photos()), atol=1e-5)


@torch.no_grad()
def test_hidden_states_are_whole_within_a_segment():
    """All tokens of a group have got the same update at every layer of it."""
    model = made(bypass="borrow", segment=6)
    states = [photos()]
    for block in adapter_of(model).blocks:
        block.register_forward_hook(lambda module, inputs, output: states.append(output - inputs[0]))
    run(model, photos())
    choice = model.blocks[0].selection.current.last.choices[1]
    for update in states[1:]:
        mine = update.gather(1, choice.skipped[..., None].expand(-1, -1, update.shape[-1]))
        places = choice.attended.gather(1, choice.partners)
        theirs = update.gather(1, places[..., None].expand(-1, -1, update.shape[-1]))
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_learned_scores_are_where_a_choice_is_made():
    model = made(score="attention", layers=[2, 3, 5, 6], segment=2)
    blocks = selective_blocks(model)
    assert [block.selector is not None for block in blocks] == [True, False, True, False]
    names = [name for name, _ in model.named_parameters() if "selector" in name]
    assert names
    assert all(name.startswith(("blocks.1.", "blocks.4.")) for name in names)
    assert torch.isfinite(run(model, photos())["logits"]).all()
    assert not any(hasattr(block, "selection") for block in original(model).blocks)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bypass": "drop", "score": "class_attention", "segment": 2}, "borrow, identity and merge, not drop"),
        ({"method": "spa", "segment": 2}, "decides in each layer"),
        ({"method": "tome", "segment": 2}, "not persist"),
        (
            {"score": "random", "bypass": "identity", "selection": "per_head", "schedule": "throughout"},
            "schedule throughout, one choice for all layers, .* not selection per_head",
        ),
        ({"score": "gate", "schedule": "throughout"}, "leave schedule throughout out"),
        ({"segment": 0}, "1 layer or more"),
        ({"segment": []}, "1 layer or more"),
        ({"segment": [2, 2]}, "make 4, and 6 layers are selective"),
        ({"layers": [2, 4, 5], "segment": [2, 1]}, "layers 2, 4 do not follow one another"),
        ({"layers": [2, 4, 6], "segment": 2}, "no two selective layers follow one another"),
        ({"layers": {2: 0.9, 3: 0.8}, "segment": 2}, "share one choice, so one ratio, not 0.9, 0.8"),
        (
            {"layers": [2, 3], "threshold": [1.0, 30.0], "segment": 2},
            "layers 2 to 3 share one choice, so one threshold, not 1, 30",
        ),
    ],
)
def test_what_cannot_be_is_one_clear_line(options, words):
    base = {"score": "similarity", "bypass": "merge", "schedule": "all"}
    if "method" in options:
        base = {}
    elif not isinstance(options.get("layers"), dict):
        base["ratio"] = 0.5
    model = lively(FAMILIES["timm vit"]())
    with pytest.raises(UsageError, match=words) as error:
        convert(model, **{**base, **options})
    assert "\n" not in str(error.value)
    assert not hasattr(model, "tosa_config")


def test_a_layer_that_follows_one_that_has_not_run_is_told():
    model = made(segment=2)
    model.forward_features(photos())
    with pytest.raises(TosaError, match="goes on with the tokens that layer 1 chose"):
        model.blocks[1](torch.randn(2, 17, 48))


def test_ratios_of_a_segment_change_together():
    model = made(segment=2)
    with pytest.raises(UsageError, match="share one choice"):
        set_ratios(model, {1: 0.7})
    with torch.no_grad():
        assert torch.equal(model(photos()), made(segment=2)(photos())), "what is refused changes nothing"
    with pytest.raises(UsageError, match="cannot choose"):
        set_ratios(made(segment=2), {}, [])
    model = set_ratios(made(segment=2), {1: 0.7, 2: 0.7})
    assert model.tosa_config.segment == [2, 2, 2]
    same = convert(original(model), model.tosa_config)
    with torch.no_grad():
        assert torch.equal(model(photos()), same(photos()))


@torch.no_grad()
@pytest.mark.parametrize("options", [{"segment": 3}, {"segment": [2, 4]}, {"layers": [1, 2], "segment": 2}], ids=str)
def test_the_control_has_the_same_segments_but_for_layer_1(options):
    control = random_control(made(**options))
    shared = [block.selection.segment for block in selective_blocks(control)]
    wanted = [block.selection.segment for block in selective_blocks(made(**options))][1:]
    assert shared == [tuple(layer for layer in segment if layer > 1) for segment in wanted]
    run(control, photos())


@torch.no_grad()
def test_a_bypass_that_runs_a_layer_itself_does():
    class Doubled(Merge):
        def apply(self, run, tokens, normed, choice):
            return tokens + 2 * (super().apply(run, tokens, normed, choice) - tokens)

    plain, doubled = made(layers=[6]), made(layers=[6], bypass=Doubled)
    states = [model.forward_intermediates(photos(), norm=False, intermediates_only=True) for model in (plain, doubled)]
    assert torch.allclose(states[1][5] - states[1][4], 2 * (states[0][5] - states[0][4]), atol=1e-4)
    with pytest.raises(UsageError, match="borrow, identity and merge"):
        made(bypass=Doubled, segment=2)


def test_what_takes_the_place_of_a_bypass_takes_its_segments_along():
    config = ConvertConfig(**MERGE, layers=[2, 3], segment=[2])
    for options in ({"method": "tome"}, {"bypass": "identity"}, {"layers": [2, 4]}):
        assert make_config(config, options).segment == 1
    assert make_config(config, {"layers": [2, 3, 4], "segment": 3}).segment == 3


@given(st.integers(1, 5), st.floats(0, 2), st.integers(0, 4), st.integers(-30, 30))
def test_a_ramp_in_segments_has_one_ratio_in_each(span, bend, first, hundredths):
    layers = list(range(2, 14))
    whole, shared = bent_ramp(layers, first, bend)(0.4), bent_ramp(layers, first, bend, span)(0.4)
    assert sum(shared.ratios.values()) == pytest.approx(sum(whole.ratios.values()), abs=0.13)
    for allocation in (shared, nudged(shared, hundredths)):
        assert all(len({allocation.ratios[layer] for layer in segment}) == 1 for segment in allocation.segments)
        config = {"layers": {layer: allocation.ratios[layer] for each in allocation.segments for layer in each}}
        lengths = [len(segment) for segment in allocation.segments]
        config = ConvertConfig(score="similarity", bypass="merge", segment=lengths, **config)
        assert config.segments(config.layers) == allocation.segments
    more = sum(nudged(shared, hundredths).ratios.values()) - sum(shared.ratios.values())
    assert more <= max(hundredths, 0) / 100 + 1e-6


@pytest.fixture(scope="module")
def small():
    return lively(VisionTransformer(**{**SMALL, "img_size": 64, "depth": 4})).eval()


def test_choosing_has_a_price(small):
    probe, share_of = convert(copy.deepcopy(small), **MERGE), MacsShare(small)
    prices = price(probe, share_of, "macs", Conditions(), Progress())
    assert prices.at(0.5, follows=True) > prices.at(0.5) > 0
    for span in (1, 2, 4):
        allocation = Allocation(dict.fromkeys(range(1, 5), 0.5), span)
        counted = share_of.of(set_ratios(probe, allocation.ratios, allocation.segments))
        assert prices.total(allocation.ratios, allocation.segments) == pytest.approx(counted, abs=1e-3)


def test_a_plan_in_segments(small):
    images = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    plan = find_plan(small, images, 0.8, segment=2)
    assert max(plan.config.segment) == 2
    converted = convert(copy.deepcopy(small), plan.config)
    assert 0.74 < MacsShare(small).of(converted) <= 0.8
