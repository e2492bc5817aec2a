"""Depth: its figures against values worked out by hand, and what is learnt of it."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import lively
from dense_models import depth_model, write_pairs
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from skimage.metrics import mean_squared_error

from tosa_convert import FinetuneSettings, UsageError, convert, evaluate, finetune, load
from tosa_convert.base.errors import TosaWarning
from tosa_convert.data.dense import sizes_of
from tosa_convert.data.images import BEYOND
from tosa_convert.planning.comparison import labelled_sample
from tosa_convert.tasks.depth import Depth, errors, silog_loss
from tosa_convert.tasks.relative_depth import RelativeDepth, aligned, aligned_errors

NAMES = tuple(Depth.metrics)


def figures(found, truth) -> dict[str, float]:
    return dict(zip(NAMES, errors(torch.tensor(found), torch.tensor(truth)).tolist(), strict=True))


def test_every_error_is_what_hand_and_pencil_make_it():
    # Found 2 for 1 and 4 for 4: logarithms differ by ln 2 and 0, and the ratios are 2 and 1.
    assert figures([2.0, 4.0], [1.0, 4.0]) == pytest.approx(
        {
            "abs_rel": 0.5,
            "sq_rel": 0.5,
            "rmse": 0.5**0.5,
            "rmse_log": 0.490129,  # ln 2 / √2
            "log10": 0.150515,  # log10(2) / 2
            "silog": 34.657359,  # 100 · ln 2 / 2
            "delta1": 0.5,
            "delta2": 0.5,
            "delta3": 0.5,
        },
        rel=1e-5,
    )


def test_the_thresholds_are_strict_and_rise():
    found = figures([1.25, 1.5, 1.9, 3.0], [1.0, 1.0, 1.0, 1.0])
    assert (found["delta1"], found["delta2"], found["delta3"]) == (0.0, 0.5, 0.75)


def test_errors_are_those_of_another_implementation():
    generator = torch.Generator().manual_seed(0)
    found, truth = (torch.rand(200, generator=generator) * 9 + 0.5 for _ in range(2))
    mine = dict(zip(NAMES, errors(found, truth).tolist(), strict=True))
    assert mine["rmse"] ** 2 == pytest.approx(mean_squared_error(truth.numpy(), found.numpy()), rel=1e-5)
    assert mine["rmse_log"] ** 2 == pytest.approx(
        mean_squared_error(truth.log().numpy(), found.log().numpy()), rel=1e-5
    )
    assert mine["silog"] == pytest.approx(100 * np.std((found.log() - truth.log()).numpy()), rel=1e-4)
    assert mine["log10"] == pytest.approx(F.l1_loss(found.log10(), truth.log10()).item(), rel=1e-5)
    assert mine["abs_rel"] == pytest.approx(F.l1_loss(found / truth, torch.ones(200)).item(), rel=1e-5)


@given(st.lists(st.tuples(st.floats(0.1, 50), st.floats(0.1, 50)), min_size=2, max_size=30), st.floats(0.2, 5))
def test_silog_knows_no_scale_and_the_others_do(pairs, factor):
    found, truth = (torch.tensor(each) for each in zip(*pairs, strict=True))
    plain, scaled = (dict(zip(NAMES, errors(each, truth).tolist(), strict=True)) for each in (found, found * factor))
    assert scaled["silog"] == pytest.approx(plain["silog"], abs=0.1, rel=1e-3)
    perfect = dict(zip(NAMES, errors(truth, truth).tolist(), strict=True))
    assert perfect == {name: 1.0 if name.startswith("delta") else 0.0 for name in NAMES}


def test_the_loss_is_its_formula_where_the_depth_is_known():
    found, truth = torch.tensor([[2.0, 4.0, 9.0]]), torch.tensor([[1.0, 4.0, np.nan]])
    logs = torch.tensor([2.0, 1.0]).log()
    wanted = 10 * (logs.square().mean() - 0.85 * logs.mean() ** 2).sqrt()
    assert silog_loss(found, truth) == pytest.approx(wanted.item(), rel=1e-6)
    assert silog_loss(truth[:, :2], truth[:, :2]) < 1e-4


def test_the_loss_has_gradients_where_it_is_zero_and_where_nothing_is_known():
    for truth in (torch.ones(2, 3), torch.full((2, 3), np.nan)):
        found = torch.ones(2, 3, requires_grad=True)
        silog_loss(found, truth).backward()
        assert found.grad.isfinite().all()


def test_alignment_is_least_squares():
    generator = torch.Generator().manual_seed(1)
    found, wanted = (torch.rand(50, generator=generator) for _ in range(2))
    slope, shift = np.polyfit(found.numpy(), wanted.numpy(), 1)
    assert torch.allclose(aligned(found, wanted), slope * found + shift, atol=1e-5)


@given(st.floats(0.1, 20), st.floats(-3, 3))
def test_a_relative_map_is_right_at_any_scale_and_shift(scale, shift):
    truth = torch.linspace(0.5, 10, 40)
    assert aligned_errors(scale / truth + shift, truth)[0] < 1e-3


def test_aligned_figures_are_named_so():
    assert set(RelativeDepth.metrics) == {f"aligned_{name}" for name in NAMES}
    assert all("aligned" in metric.title for metric in RelativeDepth.metrics.values())


def test_a_map_is_scored_at_the_size_of_its_truth():
    truth = torch.full((2, 6, 8), 2.0)
    truth[1, 4:], truth[1, :, 5:] = BEYOND, BEYOND
    truth[0, 0, 0] = np.nan
    assert sizes_of(truth) == [(6, 8), (4, 5)]
    found = Depth().measure(torch.full((2, 1, 3, 3), 3.0), truth)
    assert found["abs_rel"].tolist() == [0.5, 0.5]
    unknown = torch.full((1, 6, 8), np.nan)
    assert Depth().measure(torch.full((1, 1, 3, 3), 3.0), unknown)["rmse"].isnan().all()


def test_relative_models_are_aligned_and_named_so(tmp_path):
    write_pairs(tmp_path, 3)
    model = lively(FAMILIES["hf DepthAnything"]())
    converted = convert(copy.deepcopy(model), score="similarity", bypass="merge", layers={2: 0.4})
    models = {"original": model, "converted": converted}
    found = evaluate(models, f"depth:{tmp_path}", reference="original")["models"]
    assert set(found["converted"]) == {*RelativeDepth.metrics, "map_error"}
    assert found["original"]["map_error"] == 0
    assert found["converted"]["map_error"] > 0
    with pytest.raises(UsageError, match="labels: 0"):
        finetune(converted, f"depth:{tmp_path}", FinetuneSettings(steps=1, labels=1.0), device="cpu")
    assert finetune(converted, f"depth:{tmp_path}", FinetuneSettings(steps=1), device="cpu")["maps"] > 0


def test_depth_beyond_the_reach_of_the_head_is_said(tmp_path):
    write_pairs(tmp_path, [(np.zeros((40, 48, 3), np.uint8), np.full((40, 48), 25.0, np.float32))])
    with pytest.warns(TosaWarning, match="100% of the depth of .* is further than the 10 m"):
        evaluate(depth_model(), f"depth:{tmp_path}")


def test_a_model_that_is_its_own_original_has_nothing_to_learn_without_labels(tmp_path):
    write_pairs(tmp_path, 2)
    for model, data in ((depth_model(), tmp_path / "images"), (load("quickstart"), f"depth:{tmp_path}")):
        with pytest.raises(UsageError, match="nothing is left to learn: at ratio 1"):
            finetune(convert(model, ratio=1.0), data, FinetuneSettings(steps=1), device="cpu")


def test_comparing_takes_no_more_images_than_have_maps(tmp_path):
    write_pairs(tmp_path, 3)
    samples, _, truths = labelled_sample(depth_model(), f"depth:{tmp_path}", 24)
    assert len(samples) == len(truths) == 3


def test_a_head_learns_depth(tmp_path):
    """The image says how far everything is; a head that learns finds out."""
    pairs = []
    for index in range(4):
        far = 1.0 + 2 * index
        pairs.append((np.full((40, 48, 3), 40 * index + 20, np.uint8), np.full((40, 48), far, np.float32)))
    write_pairs(tmp_path, pairs)
    model = convert(depth_model(), ratio=1.0)
    before = evaluate(model, f"depth:{tmp_path}")["models"]["model"]["abs_rel"]
    settings = FinetuneSettings(steps=40, batch_size=4, lr=5e-3, augment="none", head_only=True)
    weights = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    found = finetune(model, f"depth:{tmp_path}", settings, device="cpu")
    assert all(torch.equal(value, weights[name]) for name, value in model.encoder.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.encoder.parameters())
    assert found["labels"] > 0
    assert evaluate(model, f"depth:{tmp_path}")["models"]["model"]["abs_rel"] < 0.5 * before


def test_without_labels_the_originals_maps_teach(tmp_path):
    write_pairs(tmp_path, 3)
    for index in range(3):
        (tmp_path / "depth" / f"{index}.npy").unlink()
    model = convert(depth_model(), score="similarity", bypass="merge", schedule="all", ratio=0.5)
    settings = FinetuneSettings(steps=2, batch_size=2, lr=1e-4)
    found = finetune(model, tmp_path / "images", settings, device="cpu")
    assert found["maps"] > 0
    assert found["features"] > 0
    assert json.dumps(found)
