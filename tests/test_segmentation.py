"""Masks: what is learnt and measured of them."""

import numpy as np
import pytest
import torch
import yaml
from conftest import lively
from dense_models import cli, write_pairs
from families import FAMILIES
from safetensors.torch import save_file

from tosa_convert import FinetuneSettings, UsageError, convert, evaluate, finetune, load, original
from tosa_convert.config.head import HeadConfig
from tosa_convert.models.dense import with_head
from tosa_convert.tasks.segmentation import Segmentation, overlap


def test_intersection_over_union_by_hand():
    found, truth = torch.tensor([1, 1, 0, 0]), torch.tensor([1, 0, 1, 0])
    assert overlap(found, truth, 1) == pytest.approx(1 / 3)
    assert overlap(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 1]), 4) == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)
    assert overlap(torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long), 1) == 1


@pytest.mark.parametrize("channels", [1, 3])
def test_masks_are_learnt_and_measured(tmp_path, channels):
    pairs = []
    for index in range(3):
        mask = np.zeros((40, 48), np.float32)
        mask[:, 12 * index : 12 * index + 16] = min(index, channels - 1) or 1
        pairs.append((np.uint8(200 * np.stack([mask > 0] * 3, -1)), mask))
    write_pairs(tmp_path, pairs, folder="masks")
    backbone = lively(FAMILIES["timm dinov2 registers"]())
    model = with_head(backbone, HeadConfig(task="segmentation", channels=channels))
    name = "iou" if channels == 1 else "image_miou"
    before = evaluate(model, f"masks:{tmp_path}")["models"]["model"][name]
    settings = FinetuneSettings(steps=40, batch_size=3, lr=3e-3, augment="none")
    model = convert(model, ratio=1.0)
    finetune(model, f"masks:{tmp_path}", settings, device="cpu")
    after = evaluate(model, f"masks:{tmp_path}")["models"]["model"]
    assert after[name] > before + 0.1
    assert ("miou" in after) == (channels > 1)
    twin = original(model)
    found = evaluate({"original": twin, "model": model}, f"masks:{tmp_path}", reference="original")
    assert found["models"]["model"]["map_iou"] == pytest.approx(1.0)


def test_the_miou_of_a_data_set_sums_pixels_over_images():
    """Two images: of class 1 there are 1 of 2 pixels, then 0 of 1; the mean of the images' own would be another."""
    task = Segmentation(2)
    truth = torch.tensor([[[1.0, 1.0, 0.0, 255.0]], [[0.0, 0.0, 0.0, 1.0]]])
    classes = torch.tensor([[[1, 0, 0, 1]], [[0, 0, 0, 0]]])
    output = 9.0 * torch.nn.functional.one_hot(classes, 2).permute(0, 3, 1, 2)
    found = task.concluded(task.tally(output[:1], truth[:1]) + task.tally(output[1:], truth[1:]))
    assert found["miou"] == pytest.approx((4 / 6 + 1 / 3) / 2)
    assert task.measure(output, truth)["image_miou"].tolist() == pytest.approx([1 / 2, (3 / 4 + 0) / 2])
    assert Segmentation().concluded(Segmentation().tally(output[:, 1:] - 1, truth)) == {}


def test_numbers_of_mask_files_are_made_sense_of():
    one, three = Segmentation(), Segmentation(3)
    assert one.truth(torch.tensor([[[0.0, 1.0]]])).tolist() == [[[0, 1]]]
    assert one.truth(torch.tensor([[[0.0, 100.0, 128.0, 255.0]]])).tolist() == [[[0, 0, 1, 1]]]
    assert three.truth(torch.tensor([[[0.0, 2.0, 255.0]]])).nan_to_num(-1).tolist() == [[[0, 2, -1]]]
    with pytest.raises(UsageError, match="class 3, and the model has 3 classes"):
        three.truth(torch.tensor([[[0.0, 3.0]]]))
    unknown = torch.full((1, 2, 2), 255.0)
    assert three.known(unknown).tolist() == [False]
    assert one.known(unknown).tolist() == [True]


def test_soft_errors_of_masks_without_anything_are_zero():
    empty = torch.full((1, 1, 4, 4), -40.0)
    assert Segmentation().error(empty, empty) == 0
    one_class = torch.tensor([40.0, -40.0, -40.0]).reshape(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert Segmentation(3).error(one_class, one_class) == pytest.approx(0.0)


def test_a_soft_error_is_zero_for_the_same_and_one_for_the_opposite():
    logits = 40 * torch.tensor([[[[1.0, 1.0], [-1.0, -1.0]]]])
    task = Segmentation()
    assert task.error(logits, logits) == pytest.approx(0.0)
    assert task.error(-logits, logits) == pytest.approx(1.0)


def test_a_recipe_takes_a_head_with_classes_through_its_stages(tmp_path):
    write_pairs(
        tmp_path / "data", [(np.zeros((28, 28, 3), np.uint8), np.full((28, 28), 2.0, np.float32))] * 2, folder="masks"
    )
    state = load("quickstart", task="segmentation", num_classes=3).head.state_dict()
    save_file(state, tmp_path / "head.safetensors")
    recipe = {
        "model": "quickstart",
        "task": "segmentation",
        "num_classes": 3,
        "head_checkpoint": str(tmp_path / "head.safetensors"),
        "data": {"train": f"masks:{tmp_path / 'data'}", "eval": f"masks:{tmp_path / 'data'}"},
        "convert": {"layers": [3], "ratio": 0.9},
        "distill": {"steps": 1, "batch_size": 2},
        "finetune": {"steps": 1, "batch_size": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    cli("run", tmp_path / "recipe.yaml", "--out", tmp_path / "out")
    assert load(tmp_path / "out" / "finetune").config.channels == 3
