"""Seeded against seeded, interrupted against uninterrupted, one process against two."""

import functools
from contextlib import suppress

import pytest
import torch
from conftest import check_resuming, run_recipe, write_images
from torch.overrides import TorchFunctionMode
from training_models import OPTIONS, converted

from tosa_convert import DistillSettings, FinetuneSettings, TosaError, UsageError, convert, distill, finetune, load
from tosa_convert.base.files import read_json
from tosa_convert.config.validation import build
from tosa_convert.data.images import Draws
from tosa_convert.models.adapter import adapter_of
from tosa_convert.runs.metrics_log import read_metrics
from tosa_convert.training import engine as engine
from tosa_convert.workflows.sources import converted as conversion_of


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(first, second, tolerance=0.0):
    return all(torch.allclose(first[key], second[key], rtol=0, atol=tolerance) for key in first)


def test_draws_are_permutations_and_start_anywhere():
    draws = list(Draws(5, 0, 20, seed=3))
    assert [position for position, _ in draws] == list(range(20))
    for start in range(0, 20, 5):
        assert sorted(index for _, index in draws[start : start + 5]) == list(range(5))
    assert list(Draws(5, 7, 20, seed=3)) == draws[7:]
    assert list(Draws(5, 0, 20, seed=4)) != draws


@pytest.mark.parametrize("verb", ["distill", "finetune"])
def test_one_seed_gives_one_result_and_leaves_the_callers_random_numbers(verb, labelled):
    run, settings = {"distill": (distill, DistillSettings), "finetune": (finetune, FinetuneSettings)}[verb]
    results = []
    for seed in (1, 1, 2):
        model = converted()
        before = torch.get_rng_state()
        run(model, labelled, settings(steps=3, batch_size=4), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        results.append(state(model))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


@pytest.mark.parametrize("verb", ["distill", "finetune"])
def test_a_killed_training_resumes_to_the_same_result(verb, labelled, tmp_path, monkeypatch):
    run, kind = {"distill": (distill, DistillSettings), "finetune": (finetune, FinetuneSettings)}[verb]
    settings = kind(steps=6, batch_size=4, accumulate=2, log_every=1, checkpoint_minutes=1e-9)
    check_resuming(functools.partial(run, data=labelled, settings=settings, seed=5), converted, tmp_path, monkeypatch)


def test_finetuning_moves_the_backbone_and_not_the_selectors(labelled):
    model = converted()
    before = state(model)
    figures = finetune(model, labelled, FinetuneSettings(steps=3, batch_size=4))
    assert set(figures) >= {"loss", "labels"}
    assert "features" not in figures
    after = state(model)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved
    assert not any(".selector." in key for key in moved)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_finetuning_without_labels_comes_closer_to_the_original(photos):
    model = converted()
    first = finetune(model, photos, FinetuneSettings(steps=1, batch_size=8, lr=1e-9, augment="none"))
    last = finetune(model, photos, FinetuneSettings(steps=25, batch_size=8, lr=5e-4, augment="none"))
    assert set(last) >= {"logits", "features"}
    assert "labels" not in last
    assert last["loss"] < 0.8 * first["loss"]


def test_a_wrong_class_count_is_refused(tmp_path):
    write_images(tmp_path / "three", 6, ["a", "b", "c"])
    with pytest.raises(UsageError, match="3 classes but the model has 10 outputs"):
        finetune(converted(), tmp_path / "three", FinetuneSettings(steps=1))


def test_random_selection_has_nothing_to_distill():
    with pytest.raises(UsageError, match="nothing to learn"):
        distill(converted(score="random"))


@pytest.mark.parametrize(("verb", "options"), [(distill, {"method": "impact"}), (finetune, OPTIONS)])
def test_a_model_whose_parameters_are_frozen(verb, options, labelled):
    """What is ours learns all the same; of a model that is frozen by its owner nothing does."""
    model = convert(load("quickstart").requires_grad_(False), **options)
    if verb is distill:
        verb(model, labelled, DistillSettings(steps=1, batch_size=4, examples=8))
    else:
        with pytest.raises(UsageError, match="all parameters are frozen"):
            verb(model.requires_grad_(False), labelled, FinetuneSettings(steps=1))
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_an_ordinary_model_has_nothing_to_train():
    with pytest.raises(UsageError, match="convert the model first"):
        distill(load("quickstart"))
    with pytest.raises(UsageError, match="not converted"):
        finetune(load("quickstart"))


def test_a_diverging_loss_stops_with_advice(photos):
    model = converted()
    with torch.no_grad():
        model.blocks[1].selector.widen.weight.fill_(float("nan"))
    with pytest.raises(TosaError, match="smaller --lr"):
        distill(model, photos, DistillSettings(steps=1, batch_size=2))


def test_epochs_count_in_passes_over_the_data():
    assert DistillSettings(epochs=2, batch_size=4, accumulate=2).total_steps(images=80, processes=1) == 20
    assert DistillSettings(epochs=2, batch_size=4, accumulate=2).total_steps(images=80, processes=2) == 10
    assert DistillSettings(epochs=0.01).total_steps(images=8, processes=1) == 1


TRAINED = {"distill": lambda key: ".selector." in key, "finetune": lambda key: ".selector." not in key}


TOLERANCE = {"distill": 2e-3, "finetune": 2e-4}


"""bf16 rounds the selectors' steps of 2e-2; the fine-tuning steps 1e-3 in float32."""


def test_two_processes_learn_what_one_does(labelled, tmp_path):
    recipe = f"""
model: quickstart
data: {{train: {labelled}, eval: {labelled}}}
convert: {{layers: [2, 4, 6], ratio: 0.5, rows: all}}  # a few rows are drawn anew by each process
distill: {{steps: 3, batch_size: BATCH, augment: none, precision: bf16}}
finetune: {{steps: 2, batch_size: BATCH, augment: none, accumulate: 2, lr: 1.0e-3}}
"""
    for name, batch, processes in (("one", 4, 1), ("two", 2, 2)):
        printed = run_recipe(recipe.replace("BATCH", str(batch)), tmp_path / name, processes)
        assert printed.count("steps") == 2, "one process should speak for all"
    for stage in TOLERANCE:
        one, two = (
            {key: value for key, value in state(load(tmp_path / name / stage)).items() if TRAINED[stage](key)}
            for name in ("one", "two")
        )
        assert same(one, two, tolerance=TOLERANCE[stage])
        trained = [read_metrics(tmp_path / name / stage) for name in ("one", "two")]
        assert [len(lines) for lines in trained] == [2, 2]
        assert trained[0][0]["loss"] == pytest.approx(trained[1][0]["loss"], rel=1e-3)


def test_a_step_is_one_update_however_many_passes_it_takes(photos, monkeypatch):
    updates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *args, **kw: (updates.append(1), step(self, *args, **kw))
    )
    distill(converted(), photos, DistillSettings(steps=3, batch_size=2, accumulate=3))
    assert len(updates) == 3


def test_two_half_batches_accumulate_to_a_whole_one(photos):
    results, losses = [], []
    for batch_size, accumulate in ((4, 1), (2, 2)):
        model = converted(rows="all")  # a few rows are drawn anew in each pass
        settings = DistillSettings(steps=3, batch_size=batch_size, accumulate=accumulate)
        losses.append(distill(model, photos, settings)["loss"])
        results.append(state(model))
    assert same(*results, tolerance=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_no_checkpoint_is_of_weights_that_are_not_finite(photos, tmp_path, monkeypatch):
    step, steps = torch.optim.AdamW.step, []

    def spoiled(self, *args, **kwargs):
        step(self, *args, **kwargs)
        steps.append(1)
        if len(steps) == 3:
            self.param_groups[0]["params"][0].data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.AdamW, "step", spoiled)
    settings = DistillSettings(steps=5, batch_size=2, log_every=100, checkpoint_minutes=1e-9)
    with pytest.raises(TosaError, match="not finite any more at step 3; try a smaller --lr"):
        distill(converted(), photos, settings, out=tmp_path)
    assert read_json(tmp_path / "checkpoint" / "step.json")["step"] == 2


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return type(self.mark).touch, (self.mark,)


def test_what_is_pickled_in_a_checkpoint_is_not_run(labelled, tmp_path):
    settings = FinetuneSettings(steps=3, batch_size=2, checkpoint_minutes=1e-9, model_ema_decay=0.9)
    train = functools.partial(finetune, data=labelled, settings=settings, out=tmp_path)
    train(converted())
    files = {path.name: path for path in (tmp_path / "checkpoint").iterdir()}
    assert {"step.json", "average.safetensors"} <= set(files)
    for name in [name for name in files if name.endswith((".bin", ".pkl"))] + ["custom_checkpoint_0.pkl"]:
        path = tmp_path / "checkpoint" / name
        before = path.read_bytes() if path.exists() else None
        torch.save(Hostile(tmp_path / "run"), path)
        with suppress(TosaError):  # accelerate does without the random numbers, which each step sets itself
            train(converted(), resume=True)
        assert not (tmp_path / "run").exists(), name
        path.unlink() if before is None else path.write_bytes(before)
    assert train(converted(), resume=True)["steps"] == 3


def test_a_model_comes_back_in_the_state_it_was_given(photos):
    model = converted()
    distill(model, photos, DistillSettings(steps=1, batch_size=2))
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert sum(len(module._forward_hooks) for module in model.modules()) == 4  # three taps, and the grid


def test_seeds_reach_the_selectors_and_the_control(tmp_path):
    from tosa_convert.config.recipe import Recipe

    assert Recipe(model="x", seed=3).convert.seed == 3
    assert Recipe(model="x", seed=3, convert={"seed": 5}).convert.seed == 5
    for convert_seed, expected in ((None, 7), (5, 5)):
        read = Recipe(model="x", convert={} if convert_seed is None else {"seed": convert_seed})
        recipe = build(Recipe, {**read.model_dump(exclude_unset=True), "seed": 7})
        assert recipe.convert.seed == expected
        recipe = recipe.model_copy(update={"model": "quickstart"})
        assert conversion_of(recipe).tosa_config.seed == expected, "and the model's"


@pytest.mark.parametrize("seed", [20260101120000, 10**19, 2**70])
def test_a_seed_may_be_of_any_size(seed, photos):
    settings = DistillSettings(steps=1, batch_size=2)
    figures = [distill(converted(seed=seed), photos, settings, seed=seed) for _ in "ab"]
    assert figures[0] == figures[1]


def test_fp16_on_a_cpu_is_refused(photos):
    with pytest.raises(UsageError, match="needs a GPU"):
        distill(converted(), photos, DistillSettings(steps=1, precision="fp16"), device="cpu")


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_attention_is_in_float32_where_a_cpu_trains_the_rest_in_bf16(photos, monkeypatch, precision):
    attended, projected = set(), set()

    class Outside(TorchFunctionMode):
        """Hears what reaches torch at last."""

        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.nn.functional.scaled_dot_product_attention:
                attended.update(each.dtype for each in (*args[:3], result))
            return result

    model = converted(score="norm", bypass="merge")
    adapter_of(model).blocks[1].mlp.fc1.register_forward_hook(lambda _, given, made: projected.add(made.dtype))
    with Outside():
        finetune(model, photos, FinetuneSettings(steps=1, batch_size=2, precision=precision))
    assert attended == {torch.float32}
    assert projected == {torch.bfloat16 if precision == "bf16" else torch.float32}


def test_the_learning_rate_is_logged_as_it_was_asked_for(labelled, tmp_path):
    """Whatever gates, or layers, make of it."""
    settings = FinetuneSettings(steps=2, batch_size=2, lr=1e-3, layer_decay=0.5, warmup=0.0, log_every=1)
    finetune(convert(load("quickstart"), method="spa"), labelled, settings, out=tmp_path / "run")
    first, *_ = read_metrics(tmp_path / "run")
    assert first["lr"] == pytest.approx(1e-3)
