import random

import numpy as np
import pytest
import torch
from conftest import write_images
from families import SMALL as FAMILY
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from tosa_convert import (
    FinetuneSettings,
    TosaError,
    UsageError,
    convert,
    evaluate,
    finetune,
    flops,
    load,
    plan,
    random_control,
)
from tosa_convert.base.errors import TosaWarning
from tosa_convert.data.images import Images, built_in_photos, loader, training_loader
from tosa_convert.data.sampling import sample
from tosa_convert.models.preprocessing import Preprocessing
from tosa_convert.tasks.classification import Classification

SMALL = Preprocessing(size=(32, 32))


def breaks(folder, name):
    (folder / name).write_bytes(b"\x89PNG nonsense")


def test_folders_with_classes_have_labels_in_order(tmp_path):
    write_images(tmp_path, 6, ["10-late", "2-early"])
    images = Images(tmp_path, SMALL)
    assert images.classes == ["2-early", "10-late"]
    assert {label for _, label, _ in (images[i] for i in range(6))} == {0, 1}


def test_flat_folders_have_none(photos):
    images = Images(photos, SMALL)
    assert not images.labelled
    assert len(images) == 8


def test_built_in_photos_are_small_and_readable():
    assert sum(path.stat().st_size for path in built_in_photos().iterdir()) < 1_000_000
    images = Images(None, SMALL)
    assert len(images) >= 8
    assert all(images[index][0].shape == (3, 32, 32) for index in range(len(images)))


def test_pixels_are_scaled_and_normalised(tmp_path):
    Image.fromarray(np.full((32, 32, 3), 255, np.uint8)).save(tmp_path / "white.png")
    image, *_ = Images(tmp_path, Preprocessing(size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1)))[0]
    assert torch.allclose(image.mean((1, 2)), torch.tensor([2.0, 1.0, 0.5]), atol=1e-4)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "RGB"])
def test_any_kind_of_image_becomes_what_the_model_takes(mode, tmp_path):
    Image.new(mode, (40, 30)).save(tmp_path / "a.png")
    for channels in (1, 3):
        preprocessing = Preprocessing(size=(32, 32), channels=channels, mean=(0.5,) * channels, std=(0.5,) * channels)
        assert Images(tmp_path, preprocessing)[0][0].shape == (channels, 32, 32)


def test_broken_images_are_skipped_counted_and_listed(photos):
    breaks(photos, "bad.png")
    whole = next(photos.glob("0*.png")).read_bytes()
    (photos / "cut.png").write_bytes(whole[: len(whole) // 2])
    batches = list(loader(Images(photos, SMALL), batch_size=4))
    assert sum(len(batch["images"]) for batch in batches) == 8
    assert sorted(name for batch in batches for name in batch["broken"]) == ["bad.png", "cut.png"]


def test_training_batches_stay_full_when_images_are_broken(photos):
    breaks(photos, "bad.png")
    batches = list(training_loader(Images(photos, SMALL, "crop"), 5, first=0, last=45, workers=0))
    assert all(len(batch["images"]) == 5 for batch in batches)
    assert {name for batch in batches for name in batch["broken"]} == {"bad.png"}


def test_a_draw_looks_the_same_whenever_it_is_made(photos):
    images = Images(photos, SMALL, "crop", seed=3)
    first = images[7, 2][0]
    assert torch.equal(images[7, 2][0], first)
    assert not torch.equal(images[8, 2][0], first)


def test_augmentation_can_be_turned_off(photos):
    plain = Images(photos, SMALL)[2][0]
    assert torch.equal(Images(photos, SMALL, "none")[7, 2][0], plain)
    flipped = [Images(photos, SMALL, "flip")[position, 2][0] for position in range(12)]
    assert {torch.equal(image, plain) for image in flipped} == {True, False}
    assert all(torch.equal(image, plain) or torch.equal(image, plain.flip(-1)) for image in flipped)


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: None, lambda path: path.write_text("x")])
def test_empty_missing_and_wrong_data_is_refused(make, tmp_path):
    path = tmp_path / "data"
    make(path)
    with pytest.raises(UsageError, match=r"no folder of images|contains no images"):
        Images(path, SMALL)


def test_nothing_readable_is_an_error(tmp_path):
    breaks(tmp_path, "bad.png")
    with pytest.raises(TosaError, match="can be read"):
        evaluate(load("quickstart"), tmp_path)
    with pytest.raises(TosaError, match="can be read"):
        Images(tmp_path, SMALL, "crop")[0, 0]
    with pytest.raises(TosaError) as stop:
        finetune(convert(load("quickstart"), ratio=0.5), tmp_path, FinetuneSettings(steps=1, workers=1))
    assert str(stop.value).startswith("none of the images in"), "and nothing of the process that read them"


def test_crops_to_measure_on_draw_nothing_from_the_caller(photos):
    found = []
    for drawing in (False, True):
        random.seed(3)
        torch.manual_seed(3)
        np.random.seed(3)
        if drawing:
            sample(photos, SMALL, 20)
        found.append((random.random(), torch.rand(1).item(), np.random.rand()))
    assert found[0] == found[1]


def test_a_sample_says_what_it_leaves_out_and_what_it_crops(photos):
    breaks(photos, "bad.png")
    here = len(list(photos.iterdir()))
    with pytest.warns(TosaWarning, match=r"^1 broken image of .*photos left out: bad\.png$"):
        assert len(sample(photos, SMALL, 20, crops=False)[0]) == here - 1
    with pytest.warns(TosaWarning, match=f"photos has fewer than 20 images, {here}: random crops"):
        sample(photos, SMALL, 20)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, "images are a NoneType; give a tensor"),
        (torch.zeros(3, 28, 28), r"shape \(3, 28, 28\) are not a batch of images of this model; give \(B, 1, H, W\)"),
        (torch.zeros(0, 1, 28, 28), "are not a batch of images"),
        (torch.zeros(2, 3, 28, 28), "are not a batch of images"),
        (torch.zeros(2, 1, 28, 28, dtype=torch.uint8), "images are torch.uint8; give preprocessed ones"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(images, message):
    with pytest.raises(UsageError, match=message):
        plan(load("quickstart"), images)
    if images is not None:
        with pytest.raises(UsageError, match=message):
            flops(load("quickstart"), images=images)


def test_evaluation_counts_top1_and_agreement(labelled):
    original = load("quickstart")
    converted = convert(load("quickstart"), layers=[2, 4], ratio=0.5)
    breaks(labelled / "3-class", "bad.png")
    models = {"original": original, "same": convert(load("quickstart"), layers=[2], ratio=1.0), "half": converted}
    results = evaluate(models, labelled, reference="original")
    assert results["images"] == 20
    assert results["broken"] == ["3-class/bad.png"]
    assert results["models"]["same"]["agreement"] == 1
    assert results["models"]["same"]["top1"] == results["models"]["original"]["top1"]
    images = Images(labelled, original.tosa_origin.preprocessing)
    good = [images[index] for index in range(len(images)) if images[index][0] is not None]
    with torch.no_grad():
        right = [converted(image[None]).argmax().item() == label for image, label, _ in good]
    assert results["models"]["half"]["top1"] == sum(right) / 20


def test_evaluation_refuses_other_classes(tmp_path):
    write_images(tmp_path, 4, ["a", "b"])
    with pytest.raises(UsageError, match="2 classes but the model has 10 outputs"):
        evaluate(load("quickstart"), tmp_path)


def test_the_random_control_is_another_model_at_the_same_ratio():
    from tosa_convert.selective.selection import chosen_tokens

    model = convert(load("quickstart"), layers=[2], ratio=0.5)
    control = random_control(model)
    image = torch.randn(2, 1, 28, 28)
    model(image), control(image)
    ours, theirs = chosen_tokens(model)[2], chosen_tokens(control)[2]
    assert ours.shape == theirs.shape
    assert set(ours[0].tolist()) != set(theirs[0].tolist())
    assert torch.equal(theirs[0], theirs[1])


def has_labels(folder, classes: list[str]) -> bool:
    """Of a model with these two classes."""
    model = VisionTransformer(**{**FAMILY, "num_classes": 2})
    model.pretrained_cfg = {"label_names": classes}
    return Classification().has_labels(Images(folder, SMALL), model)


def test_doubtful_labels_are_refused(tmp_path):
    write_images(tmp_path / "both/train", 4, ["a", "b"])
    write_images(tmp_path / "both/val", 4, ["a", "b"])
    write_images(tmp_path / "stray", 4, ["a", "b"])
    write_images(tmp_path / "stray", 1)
    for folder, words in (("both", "same name"), ("stray", "next to the class folders")):
        with pytest.raises(UsageError, match=words):
            has_labels(tmp_path / folder, [])


def test_folders_named_like_the_classes_must_be_in_their_order(tmp_path):
    write_images(tmp_path, 4, ["boot", "shirt"])
    assert has_labels(tmp_path, ["boot", "shirt"])
    with pytest.raises(UsageError, match="another order"):
        has_labels(tmp_path, ["shirt", "boot"])
