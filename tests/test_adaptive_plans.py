"""Adaptive plans: thresholds that are found for a budget on average."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from conftest import lively, write_images
from references import first
from threshold_models import at_the_middle, built
from timm.models.vision_transformer import VisionTransformer

from tosa_convert import UsageError, convert, evaluate, find_plan, flops, load, save
from tosa_convert.export.graph import write_graph
from tosa_convert.measure.evaluation import random_control
from tosa_convert.measure.macs_share import MacsShare
from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.planning import adaptive as planning
from tosa_convert.planning import plan as plans
from tosa_convert.planning import rivals
from tosa_convert.planning.budget import at_budget
from tosa_convert.selective.selection import last_choices


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
        ({"adaptive": True}, 2, "from 2 images it cannot be seen"),
        ({"adaptive": True, "max_macs": 0.7}, 9, "raise --max-macs"),
        ({"adaptive": True, "max_macs": 1.5}, 9, "1.5 is out of range"),
        ({"max_macs": 0.9}, 9, "give adaptive too"),
    ],
)
def test_adaptive_plans_that_make_no_sense(small, options, count, message):
    with pytest.raises(UsageError, match=message):
        find_plan(small[0], small[1][:count], 0.8, **options)


def test_what_is_no_batch_of_images_is_said_in_one_line(small):
    model, images = small[0], small[1]
    height, width = images.shape[-2:]
    for given, words in (
        (torch.full_like(images, float("nan")), "not finite"),
        (images[..., : height - 1, : width - 1], f"does not take images of {height - 1}×{width - 1}"),
    ):
        with pytest.raises(UsageError, match=words):
            flops(model, images=given)
    with pytest.raises(UsageError, match="not finite"):
        find_plan(model, torch.full_like(images, float("nan")), 0.8)
    with pytest.raises(UsageError, match="images are named here, by a folder or another source, and this is a Tensor"):
        evaluate(model, images)


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


def test_broken_images_show_nothing_of_how_images_differ(tosa, tmp_path):
    """Nor do crops of the one that can be read."""
    write_images(tmp_path / "four", 1)
    for number in range(3):
        (tmp_path / "four" / f"bad{number}.png").write_bytes(b"\x89PNG nonsense")
    code, _, err = tosa("plan", "quickstart", "--adaptive", "--data", "four", "--out", "plan")
    assert code == 2
    assert "3 broken images of four left out: bad0.png, bad1.png, bad2.png" in err
    assert "1 image of four cannot show how images differ" in " ".join(err.split())
    assert not Path("plan").exists()


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
