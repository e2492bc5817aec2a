"""Token impact: what a token is worth, and the filter that learns it."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import lively, write_images
from families import FAMILIES
from gated_models import photos, vit
from PIL import Image
from references import close, first
from safetensors.torch import load_file

from tosa_convert import DistillSettings, TosaError, UsageError, convert, distill, load
from tosa_convert.base.errors import InterruptedTrainingError
from tosa_convert.models.adapter import run
from tosa_convert.planning import comparison
from tosa_convert.planning.comparison import compare
from tosa_convert.planning.mean_macs import at_mean
from tosa_convert.selective.selection import all_tokens, chosen_tokens
from tosa_convert.training import impact as impact_module
from tosa_convert.training.impact import FILE, impact_of


def test_a_filter_of_token_impact_is_the_only_one():
    with pytest.raises(UsageError, match=r"learns for one choice, .* here 3 layers choose; .*--method impact"):
        distill(convert(vit(), score="impact", layers=[2, 4, 6]), None, DistillSettings(steps=1))


@torch.no_grad()
def test_impact_is_the_loss_without_a_token_less_the_loss_with_all():
    model, image = vit(), photos(1)
    converted = convert(copy.deepcopy(model), method="impact")
    for label in (2, None):
        found = impact_of(converted, image, label)
        whole = model(image)

        def loss(logits, label=label, whole=whole):
            if label is not None:
                return F.cross_entropy(logits, torch.tensor([label]))
            return F.kl_div(logits.log_softmax(-1), whole.log_softmax(-1), log_target=True, reduction="sum")

        tokens = model._pos_embed(model.patch_embed(image))
        assert torch.allclose(found.tokens, tokens[0, 1:])
        for place in range(16):
            left = tokens.clone()
            left[:, place + 1] = 0
            logits = model.forward_head(model.norm(model.blocks(left)))
            assert found.impact[place] == pytest.approx((loss(logits) - loss(whole)).item(), abs=1e-5)


def test_impact_on_embeddings_is_an_angle_and_on_maps_a_distance(tmp_path):
    clip = convert(lively(FAMILIES["hf CLIPModel"]()), method="impact")
    found = impact_of(clip, photos(1), None)
    with torch.no_grad():
        doubled = copy.deepcopy(clip)
        doubled.visual_projection.weight *= 2
    assert torch.allclose(impact_of(doubled, photos(1), None).impact, found.impact, atol=1e-5)
    write_images(tmp_path / "images", 3)
    write_images(tmp_path / "masks", 3)
    for file in sorted((tmp_path / "masks").glob("*.png")):
        Image.fromarray((np.arange(32 * 32).reshape(32, 32) % 2 * 255).astype(np.uint8)).save(file)
    model = load("quickstart", task="segmentation")
    convert(model, method="impact")
    figures = distill(model, f"masks:{tmp_path}", DistillSettings(steps=2, examples=3, batch_size=2))
    assert figures["images"] == 3


def test_impact_in_half_precision(outlined):
    settings = DistillSettings(steps=2, examples=3, batch_size=2)
    assert distill(convert(vit(), method="impact").bfloat16(), outlined[0], settings)["images"] == 3
    with pytest.raises(UsageError, match="the weights are float16"):
        distill(convert(vit(), method="impact").half(), outlined[0], settings)


@pytest.mark.parametrize(("minutes", "kept"), [(1e-9, [0, 1, 2]), (5.0, [0, 0, 0])])
def test_impact_is_kept_as_often_as_checkpoints_are(tmp_path, outlined, monkeypatch, minutes, kept):
    """Not with every few images, which would write a large file over and over."""
    settings, work, found = (
        DistillSettings(steps=1, examples=3, checkpoint_minutes=minutes),
        impact_module.impact_of,
        [],
    )

    def watched(*given):
        file = tmp_path / "run" / FILE
        found.append(sum(name.startswith("impact.") for name in load_file(file)) if file.exists() else 0)
        return work(*given)

    monkeypatch.setattr(impact_module, "impact_of", watched)
    distill(convert(vit(), method="impact"), outlined[0], settings, out=tmp_path / "run")
    assert found == kept
    assert (tmp_path / "run" / FILE).exists()


def test_what_was_worked_out_of_the_impact_outlives_an_interruption(tmp_path, outlined, monkeypatch):
    settings, work = DistillSettings(steps=2, examples=6, batch_size=4), impact_module.impact_of
    seen = []

    def interrupted(*given):
        if len(seen) == 4:
            raise KeyboardInterrupt
        seen.append(work(*given))
        return seen[-1]

    monkeypatch.setattr(impact_module, "impact_of", interrupted)
    with pytest.raises(InterruptedTrainingError, match=r"interrupted after 4 of 6 images; .* --out .* --resume"):
        distill(convert(vit(), method="impact"), outlined[0], settings, out=tmp_path / "run")
    seen.clear()
    kept = tmp_path / "run/impact.safetensors"
    content = kept.read_bytes()
    kept.write_bytes(content[:100])
    with pytest.raises(TosaError, match=r"impact.safetensors is damaged .*; remove it to work it out anew"):
        distill(convert(vit(), method="impact"), outlined[0], settings, out=tmp_path / "run", resume=True)
    kept.write_bytes(content)
    assert distill(convert(vit(), method="impact"), outlined[0], settings, out=tmp_path / "run", resume=True)
    assert len(seen) == 2, "the others were known"


@torch.no_grad()
@pytest.mark.parametrize("name", ["timm vit", "hf DINOv3ViTModel", "timm eva02"])
def test_tokens_that_are_filtered_are_gone_from_all_layers(name):
    torch.manual_seed(0)
    model, images = lively(FAMILIES[name]()), photos(4)
    converted = at_mean(convert(copy.deepcopy(model), method="impact"), images, 0.8)
    found = run(converted, images)
    chosen = chosen_tokens(converted)
    assert [len(tokens) for tokens in chosen[1]] == [len(tokens) for tokens in chosen[6]]
    alone = [run(converted, image[None]) for image in images]
    for output, value in found.items():
        assert close(value, torch.cat([each[output] for each in alone]))
    if name == "timm vit":
        for image, tokens, logits in zip(images, chosen[1], found["logits"], strict=True):
            kept = model._pos_embed(model.patch_embed(image[None]))[:, tokens]
            assert close(model.forward_head(model.norm(model.blocks(kept))), logits[None])


def test_a_filter_learns_and_goes_on_where_it_was(tmp_path, outlined):
    settings = DistillSettings(steps=40, examples=10, batch_size=4)

    def learnt(out, resume=False):
        model = convert(vit(), method="impact")
        return distill(model, outlined[0], settings, out=out, resume=resume), model

    figures, model = learnt(tmp_path / "one")
    assert 0 <= figures["precision"] <= 1
    assert 0 < figures["kept"] < 1
    assert figures["images"] == 6, "all there are"
    kept = (tmp_path / "one" / FILE).read_bytes()
    again, same = learnt(tmp_path / "one", resume=True)
    assert again == figures
    assert (tmp_path / "one" / FILE).read_bytes() == kept
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values(), strict=True))
    with all_tokens(model), torch.no_grad():
        assert close(first(run(model, photos())), first(run(vit(), photos()))), "the model itself does not move"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rho": 1e9}, "labels none of the tokens"), ({"rho": -1e9}, "labels all of the tokens")],
)
def test_a_rho_that_tells_nothing_apart(outlined, options, message):
    with pytest.raises(UsageError, match=message):
        distill(convert(vit(), method="impact", **options), outlined[0], DistillSettings(steps=1, examples=3))


def test_impact_goes_by_the_output_where_labels_are_of_other_classes(tosa, outlined):
    train = ("distill", "quickstart", "--method", "impact", "--steps", 1, "--examples", 3, "--data", outlined[0])
    code, out, err = tosa(*train, "--out", "run")
    assert code == 0, err
    assert "labels are left out" in err
    assert "has 5 classes but the model has 10 outputs" in err
    code, out, err = tosa(*train, "--kept", 0.9, "--out", "run", "--resume")
    assert code == 2
    assert "run was started with other settings (convert.kept)" in err


def test_what_is_learnt_by_ablation_is_learnt_once_for_all_budgets(outlined, monkeypatch):
    """And is the same as if it were learnt for each."""
    learnt, taught = [], comparison.distill

    def counted(model, *args, **kwargs):
        learnt.append(model)
        return taught(model, *args, **kwargs)

    monkeypatch.setattr(comparison, "DistillSettings", lambda steps: DistillSettings(steps=steps, examples=3, lr=0.1))
    monkeypatch.setattr(comparison, "distill", counted)
    settings = {"data": outlined[0], "images": 4, "runtime": None, "distill_steps": 2}
    both = compare(vit(), budgets=[0.9, 0.8], methods=["impact"], **settings)["rows"]
    assert len(learnt) == 1
    alone = compare(vit(), budgets=[0.8], methods=["impact"], **settings)["rows"]
    of_impact = [[row for row in rows if (row["method"], row["budget"]) == ("impact", 0.8)] for rows in (both, alone)]
    assert of_impact[0] == of_impact[1]
    assert len(of_impact[0]) == 1


def test_token_impact_of_one_image_is_refused_before_the_work(tosa):
    write_images(Path("one"), 1)
    code, out, err = tosa("distill", "quickstart", "--method", "impact", "--data", "one", "--out", "filter")
    assert code, out
    assert "one image is too few" in err
    assert not Path("filter").exists()
