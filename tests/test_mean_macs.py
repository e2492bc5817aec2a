"""Thresholds that are moved to a mean cost, and what is said where they tell nothing apart."""

import json
import re
from pathlib import Path

import pytest
import torch
from gated_models import gated, photos, vit
from references import first

from tosa_convert import TosaError, UsageError, convert, load
from tosa_convert.measure.evaluation import random_control
from tosa_convert.measure.macs_share import MacsShare
from tosa_convert.models.adapter import run
from tosa_convert.planning.mean_macs import _Shares, at_mean
from tosa_convert.reporting.result_tables import eval_table
from tosa_convert.selective.selection import choosing_blocks


@pytest.mark.parametrize("method", ["spa", "impact"])
def test_thresholds_are_moved_to_a_mean(method):
    model, images = gated() if method == "spa" else convert(vit(), method="impact"), photos(6)
    found = at_mean(model, images, 0.85)
    share = MacsShare(vit()).of(found, images)
    assert 0.78 < share <= 0.85
    again = at_mean(model.train(), images, 0.85)
    assert again.tosa_config.threshold == found.tosa_config.threshold, "a gate in training draws noise"
    with pytest.raises(UsageError, match="give a higher share"):
        at_mean(model, images, 0.01)
    with pytest.raises(UsageError, match="from 3 images it cannot be seen how images differ; take 4 or more"):
        at_mean(model, images[:3], 0.85)
    bounded = convert(vit(), score="norm", layers=[3, 4], threshold=4.0, ratio=0.5)
    with pytest.raises(UsageError, match=r"bound their tokens images take 0.* at most, below 0.99"):
        at_mean(bounded, images, 0.99)
    with pytest.raises(UsageError, match="at_mean is for thresholds"):
        at_mean(convert(vit(), score="norm"), images, 0.5)


@pytest.mark.parametrize("chance", [False, True])
def test_images_that_keep_as_many_tokens_cost_the_same(chance):
    model, images = convert(vit(), method="impact"), photos(12)
    model = random_control(model, 0) if chance else model
    (block,) = choosing_blocks(model)
    share_of = MacsShare(vit())
    shares = _Shares(share_of, model, images)
    levels, before = shares.levels(), block.selection.threshold
    for by in (*levels[1:-1:40], levels[0], levels[-1]):
        block.selection.threshold = before + float(by)
        assert shares.mean() == pytest.approx(share_of.of(model, images), abs=1e-9)


def test_thresholds_are_moved_to_a_mean_after_training(tosa, outlined):
    train = (
        "finetune",
        "quickstart",
        "--method",
        "spa",
        "--steps",
        1,
        "--batch-size",
        4,
        "--data",
        outlined[0],
        "--teacher",
    )
    code, out, err = tosa(*train, "--mean-macs", 0.75, "--out", "moved", "--json")
    assert code == 0, err
    cost, moved = json.loads(out)["flops"], load("moved").tosa_config.threshold
    assert 0.7 < cost["macs"] / cost["original"] <= 0.75
    assert len({round(each, 4) for each in moved}) == 1
    assert moved[0] != 0, "all by one number"
    code, out, err = tosa("report", "moved", "--out", "moved.html")
    assert code == 0, err
    page = Path("moved.html").read_text()
    saved = f"{100 * (1 - cost['macs'] / cost['original']):.1f} %"
    (shown,) = re.findall(r"MACs saved</td><td>(.*?)</td>", page)
    assert shown.startswith(saved)
    assert "the mean of 6 images of " in shown
    code, out, err = tosa(*train, "--mean-macs", 0.05, "--out", "kept")
    assert code == 2
    assert re.search(r"even with the fewest tokens images take 0\.\d{3} of the MACs, above 0.05", err)
    assert not Path("kept").exists(), "nothing was trained"
    for file in list(outlined[0].rglob("*.png"))[1:]:
        file.unlink()
    code, out, err = tosa(*train, "--mean-macs", 0.75, "--out", "one")
    assert code == 2
    assert "from 1 image it cannot be seen how images differ" in err
    assert not Path("one").exists(), "nothing was trained"
    code, out, err = tosa(
        "finetune", "quickstart", "--score", "norm", "--steps", 1, "--mean-macs", 0.7, "--out", "none"
    )
    assert code == 2
    assert err.startswith("error: a mean of the MACs is for conversions with thresholds")
    assert not Path("none").exists()


def test_a_training_that_moves_the_cost_of_a_run_says_so(tosa, outlined):
    train = ("--data", outlined[0], "--batch-size", 4, "--teacher")
    for source, options, says in (
        (("quickstart", "--method", "spa"), ("--steps", 1, "--out", "first"), False),
        (("first",), ("--steps", 1, "--lr", 1e-9, "--out", "still"), False),
        (("first",), ("--steps", 3, "--lr", 0.2, "--out", "moved"), True),
        (("first",), ("--steps", 3, "--lr", 0.2, "--mean-macs", 0.75, "--out", "set"), False),
    ):
        code, _, err = tosa("finetune", *source, *train, *options)
        assert code == 0, err
        assert ("of the MACs now, 1.00" in " ".join(err.split())) == says, (options, err)


def test_what_cannot_be_traced_or_exported_says_so():
    model, images = convert(vit(), score="norm", threshold=2.0, layers=[2, 4]), photos()
    with pytest.raises(TosaError, match="cannot be traced"):
        torch.jit.trace(model, (images[:1],), check_trace=False)
    with pytest.raises(Exception, match="give an example of batch 1"):
        torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert first(run(model, images[:0])).shape == (0, 5)


@pytest.mark.parametrize(("threshold", "why"), [(1e9, "no patch reaches"), (-1e9, "every patch reaches")])
@pytest.mark.parametrize(
    "method",
    [
        ("--score", "norm", "--bypass", "borrow", "--schedule", "pairs"),
        ("--score", "norm", "--bypass", "borrow", "--schedule", "all"),
        ("--score", "similarity", "--bypass", "merge", "--schedule", "all"),  # which keeps more than one at least
    ],
)
def test_a_threshold_that_tells_nothing_apart_is_named(tosa, threshold, why, method):
    code, out, err = tosa("flops", "quickstart", *method, "--threshold", threshold)
    assert code == 0, err
    assert f"which all take the same: {why} the threshold" in " ".join(out.split())
    code, out, err = tosa("show", "quickstart", *method, "--threshold", threshold)
    assert code == 0, err
    assert ("every patch reaches the threshold" in " ".join(out.split())) == (threshold < 0)


@pytest.mark.parametrize("options", [(), ("--score", "norm", "--bypass", "merge", "--schedule", "all")])
def test_without_a_threshold_none_is_blamed(tosa, outlined, options):
    code, out, err = tosa("flops", "quickstart", *options, "--data", outlined[0], "--images", 3)
    assert code == 0, err
    assert "which all take the same" in " ".join(out.split())
    assert "reaches" not in out


def test_containers_are_for_images_that_differ_in_number():
    with pytest.raises(UsageError, match="container goes with a threshold"):
        convert(load("quickstart"), score="norm", ratio=0.5, container=64)


def test_what_an_older_version_noted_of_images_is_still_shown():
    macs = {"macs": 0.7, "least": 0.6, "most": 0.8}
    results = {"data": "photos", "images": 3, "broken": [], "models": {"model": {"top1": 0.5}}, "macs": macs}
    notes = " ".join(eval_table({**results, "macs_before": 0.5}).notes)
    assert "70.0 % of the original on average, 60.0 % to 80.0 %" in notes
    assert "bound each with --max-macs" in notes
    new = {**results, "macs_before": 0.5, "macs_over": 3, "macs_learnt": True}
    notes = " ".join(eval_table(new).notes)
    assert "on average over 3 of these images" in notes
    assert "finetune the run on images like these with --mean-macs" in notes
