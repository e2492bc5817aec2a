"""Plans keep their budget, measure what they claim, and are never behind a plain ramp."""

import copy

import pytest
import torch
from conftest import lively
from families import FAMILIES, HF_SMALL, SMALL
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from transformers import Data2VecVisionConfig, Data2VecVisionModel

from tosa_convert import ConvertConfig, UsageError, convert, find_plan, flops, load, plan
from tosa_convert.base.progress import Progress
from tosa_convert.data.sampling import sample
from tosa_convert.export import runtimes
from tosa_convert.measure.similarity import error, figures, observe
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.planning import cost_model, latency, rivals
from tosa_convert.planning.allocation import FINE, Allocation, bent_ramp, fit
from tosa_convert.planning.cost_model import Conditions, Prices
from tosa_convert.planning.resuming import catching, resumed
from tosa_convert.planning.search import Search
from tosa_convert.planning.trial import Trial, ahead, typical
from tosa_convert.selective.conversion import is_converted, set_ratios

LINE = Prices("macs", (0.2, 1.0), (0.08, 0.0))


@given(
    first=st.integers(0, 5),
    bend=st.floats(0.0, 2.0),
    budget=st.floats(0.75, 0.99),
)
def test_a_ramp_is_fitted_to_the_budget_and_never_rises(first, bend, budget):
    layers = list(range(1, 7))
    ratios = fit(bent_ramp(layers, first, bend), LINE, budget)
    if ratios is None:
        assert LINE.total(bent_ramp(layers, first, bend)(FINE[-1]).ratios) > budget
        return
    assert LINE.total(ratios.ratios) <= budget
    in_order = [ratios.ratios[layer] for layer in layers]
    assert in_order == sorted(in_order, reverse=True)
    assert all(ratio == 1 for ratio in in_order[:first])


@given(
    levels=st.lists(st.integers(1, 100), min_size=2, max_size=30, unique=True),
    parts=st.integers(1, 4),
)
def test_halving_finds_what_is_better_on_every_image_and_measures_nothing_twice(levels, parts):
    measured = []

    def measure(ratios, part):
        measured.append((ratios[1], part))
        return torch.full((3,), float(ratios[1]))

    trial = Trial(measure, parts, Progress())
    candidates = {str(level): {1: level} for level in levels}
    plain = next(iter(candidates))
    assert trial.candidates.get(trial.halve(candidates, plain, "")) == {1: min(levels)}
    assert len(trial.errors(plain)) == 3 * parts, "the plain one is known on all images"
    assert trial.halve(candidates, plain, "") == str(min(levels))
    assert len(measured) == len(set(measured))


def test_what_was_best_is_not_lost_to_what_was_measured_on_easier_images():
    """The second half of the images is hard, and only the best of before has been measured on it."""
    levels = {"plain": 1.2, "best": 1.0} | {f"near {index}": 1.1 for index in range(9)}
    trial = Trial(lambda named, part: torch.full((3,), levels[named] * (1 if part < 2 else 9)), 4, Progress())
    assert trial.halve({name: name for name in ("plain", "best")}, "plain", "") == "best"
    assert trial.halve({name: name for name in (*levels,) if name != "plain"}, "plain", "") == "best"


def test_ahead_means_clearly_ahead():
    errors = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert ahead(errors - 0.5, errors)
    assert not ahead(errors - torch.tensor([2.0, 0.0, 0.0, 0.0]), errors)
    assert not ahead(errors, errors)


@pytest.fixture(scope="module")
def small():
    """Of four layers and 64 patches: the multiply–adds of such a model are counted in no time."""
    model = lively(VisionTransformer(**{**SMALL, "img_size": 64, "depth": 4}))
    return model, torch.randn(9, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def planned(small):
    return find_plan(*small, 0.8)


def test_a_plan_keeps_its_budget_and_its_error_is_what_is_measured(small, planned):
    check_plan(*small, planned)


@pytest.mark.long
def test_a_plan_beats_what_is_made_by_hand(monkeypatch):
    monkeypatch.setattr(rivals, "lasting", lambda _: [])  # a published method that is ahead would be the plan
    model = load("quickstart")  # real weights: of random ones any schedule may be the best
    photos = sample(None, preprocessing_of(model), 8)[0]
    planned = find_plan(model, photos, 0.8)
    check_plan(model, photos, planned)
    assert planned.measured <= min(planned.rivals.values())
    assert planned.config.bypass == "merge"


def check_plan(model, photos, planned):
    converted = convert(copy.deepcopy(model), planned.config)
    cost = flops(converted)
    assert 0.77 <= cost.macs / cost.original <= 0.8
    wanted, found = observe(model, photos), observe(converted, photos)
    search = Search(model, photos, None, None, None, 16, Progress())
    search.build(planned.config.score, planned.config.bypass)
    ratios = dict(zip(planned.config.layers, planned.config.ratio, strict=True))
    resumed = torch.cat([search.error_of(Allocation(ratios), part) for part in range(len(search.batches))])
    assert error(found, wanted, search.keep).mean().item() == pytest.approx(resumed.mean().item(), rel=1e-3)
    assert not hasattr(model, "tosa_config"), "the model is left as it is"


def test_a_published_method_is_the_plan_where_it_is_ahead_by_however_little(small, planned, monkeypatch):
    monkeypatch.setattr(rivals, "lasting", lambda _: ["tome"])
    for errors, chosen in ((planned.measured - 1e-6, True), (planned.measured + 1e-6, False)):
        monkeypatch.setattr(rivals, "_errors", lambda *_, level=errors: torch.full((3,), level))
        found = find_plan(*small, 0.8)
        assert ("the plan without it" in found.rivals) is chosen
        assert (found.config == planned.config) is not chosen
        assert found.measured == pytest.approx(min(errors, planned.measured))


def test_no_image_with_a_large_error_decides_alone():
    assert typical(torch.tensor([0.25, 0.25])) == pytest.approx(0.25)
    assert typical(torch.tensor([0.01, 0.01, 0.01, 0.4])) < typical(torch.tensor([0.09, 0.09, 0.09, 0.09]))
    assert typical(torch.tensor([-1e-7, 0.0])) == 0, "cosines are rounded"


def test_published_methods_are_tried_with_one_share_in_each_layer_too_and_none_twice():
    ways = rivals._evenly(["tome", "mctf", "mctf_fast", "pitome"])
    assert ways == ["similarity/persist/geometric", "multi_criteria/pool/geometric"]


def test_a_plan_is_the_same_again(small, planned):
    assert plan(*small, budget=0.8) == planned.config
    assert plan(small[0], small[1][:1], budget=0.8).layers, "a single image will do"


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("timm vit", "similarity"),
        ("timm vit", "class_attention"),
        ("hf Data2Vec", "similarity"),
        ("hf SAM", "similarity"),
        ("hf YolosModel", "similarity"),
        ("hf DPT", "similarity"),
    ],
)
def test_a_resumed_pass_is_a_whole_one(name, score):
    """Layers before the first that skip give what they gave to the original; also blocks that return tuples, where
    other blocks or additions stand between them, and where a head takes their outputs."""
    torch.manual_seed(0)
    model = lively(FAMILIES.get(name, _data2vec)())
    photos = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with catching(model, 3) as given:
        observe(model, photos)
    probe = convert(copy.deepcopy(model), score=score, bypass="merge", schedule="all", ratio=0.5)
    set_ratios(probe, {layer: 1.0 if layer < 4 else 0.5 for layer in probe.tosa_config.layers})
    wanted = observe(probe, photos)
    with resumed(probe, given, 4):
        found = observe(probe, photos)
    assert torch.allclose(found.patches, wanted.patches, atol=1e-5)
    assert torch.allclose(found.output, wanted.output, atol=1e-5 * max(1.0, wanted.output.abs().max().item()))
    assert not torch.allclose(found.patches, observe(model, photos).patches, atol=1e-2)


def _data2vec():
    return Data2VecVisionModel(Data2VecVisionConfig(**HF_SMALL))


def test_a_target_drop_gives_the_cheapest_plan_within_it(small, monkeypatch):
    monkeypatch.setattr(rivals, "lasting", lambda _: ["tome"])  # the others would only take time
    model, photos = lively(VisionTransformer(**{**SMALL, "img_size": 64})), small[1]
    tight, loose = (find_plan(model, photos, target_drop=drop) for drop in (0.2, 0.6))
    assert loose.cost < tight.cost
    wanted, found = observe(model, photos), observe(convert(copy.deepcopy(model), loose.config), photos)
    assert 1 - figures(found, wanted)["agreement"].mean() <= 0.6


def timed_as(monkeypatch, overhead: float, slow: float = 0.0):
    """Times as a machine would have them on which a model takes 40 ms, a converted one as much as its share of the
    multiply–adds and, when a plan is measured as a whole, ``overhead`` more."""

    def times(models, conditions, progress, rounds=15):
        found = {}
        for name, model in models.items():
            cost = flops(model)
            whole = overhead if name == "plan" else 0.0
            found[name] = 40 * (cost.macs / cost.original + (slow + whole if is_converted(model) else 0.0))
        return found

    monkeypatch.setattr(latency, "time_models", times)
    monkeypatch.setattr(cost_model, "time_models", times)


@pytest.mark.parametrize("overhead", [0.05, *(pytest.param(each, marks=pytest.mark.long) for each in (0.0, -0.04))])
def test_a_plan_for_a_latency_is_corrected_until_it_holds(small, monkeypatch, overhead):
    timed_as(monkeypatch, overhead)
    found = find_plan(*small, target_ms=34, segment=1)
    assert found.by == "latency"
    assert found.timed.met
    assert found.timed.plan == pytest.approx(34, rel=0.05)
    assert found.timed.original == 40
    cost = flops(convert(copy.deepcopy(small[0]), found.config))
    assert found.timed.plan == pytest.approx(40 * (cost.macs / cost.original + overhead))


@pytest.mark.parametrize(
    ("target", "overhead", "message"),
    [
        (45, 0, "nothing to convert"),
        (2, 0, "out of reach"),
        pytest.param(38, 2.0, "no gain at this size", marks=pytest.mark.long),
    ],
)
def test_a_latency_that_cannot_be_had_is_refused(small, monkeypatch, target, overhead, message):
    timed_as(monkeypatch, overhead)
    with pytest.raises(UsageError, match=message):
        find_plan(*small, target_ms=target, segment=1)


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        (Conditions("tensorrt"), "choose from eager, compile, onnx"),
        (Conditions("eager", "int8"), "use runtime onnx"),
        (Conditions("onnx", "bfloat16"), "only in float32 and int8"),
        (Conditions("onnx", threads=10_000), "more than the"),
    ],
)
def test_a_latency_under_impossible_conditions_is_refused(small, conditions, message):
    with pytest.raises(UsageError, match=message):
        find_plan(*small, by="latency", conditions=conditions)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "out of range"),
        ({"budget": 0.8, "target_ms": 20}, "keep one of them"),
        ({"target_ms": -3}, "out of range"),
        ({"target_ms": 20, "adaptive": True}, "budget of MACs"),
        ({"budget": 1.2}, "out of range"),
        ({"budget": 0.05}, "out of reach"),
        ({"budget": 0.8, "target_drop": 0.1}, "keep one of them"),
        ({"target_drop": -1}, "out of range"),
        ({"batch_size": 0}, "out of range"),
        ({"labels": torch.zeros(2)}, "2 labels are given for"),
    ],
)
def test_impossible_plans_are_refused(small, options, message):
    with pytest.raises(UsageError, match=message):
        find_plan(*small, **options)


def test_a_converted_model_is_not_planned_for(small):
    model, photos = small
    with pytest.raises(UsageError, match="converted already"):
        find_plan(convert(copy.deepcopy(model), score="random"), photos, 0.8)


def test_plans_for_models_without_a_class_token_or_a_head():
    model = lively(FAMILIES["timm siglip"]())
    model.reset_classifier(0)
    photos = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UsageError, match="no task that is measured by them"):
        find_plan(model, photos, 0.85, labels=torch.zeros(4, dtype=torch.long))
    model.blocks[0].train()
    found = find_plan(model, photos, 0.85)
    assert [block.training for block in model.blocks[:2]] == [True, False], "each module is in the mode that it was in"
    assert isinstance(found.config, ConvertConfig)
    assert not any("class_attention" in pair for pair in found.parts)


def test_latencies_are_of_the_device_that_is_asked_for_and_models_stay_where_they_are(monkeypatch):
    asked = []

    def timed(models, settings, *, data, device, progress):
        asked.append(device)
        raise UsageError("nothing can be timed")

    monkeypatch.setattr(cost_model, "bench", timed)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *where: asked.append(where) or self)
    model, conditions = load("quickstart"), Conditions("onnx", device="cuda")
    with pytest.raises(UsageError):
        cost_model.time_models({"original": model}, conditions, Progress())
    assert asked == ["cuda", (torch.device("cpu"), torch.float32)], "there, and back even so"
    assert str(conditions) == "onnx, float32, batch 1, 1 thread, cuda"
    Conditions("onnx", "int8", device="cuda").check(timed=False)
    monkeypatch.setattr(cost_model, "pick_device", lambda device: device)
    monkeypatch.setattr(runtimes, "providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UsageError, match="no CUDAExecutionProvider; install onnxruntime-gpu, or add --device cpu"):
        conditions.check()
