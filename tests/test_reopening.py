"""Saved models come back as they were; images are prepared for them as their library does it."""

import copy
import json

import numpy as np
import pytest
import timm
import torch
import transformers
from conftest import lively, write_images
from families import FAMILIES, HF_SMALL
from PIL import Image
from test_loading import outputs

from tosa_convert import TosaError, UsageError, convert, load, save
from tosa_convert.data.images import read_image
from tosa_convert.measure.macs import flops_on
from tosa_convert.models.adapter import adapter_of
from tosa_convert.models.loading import _transformers_preprocessing
from tosa_convert.models.preprocessing import Preprocessing
from tosa_convert.models.provenance import preprocessing_of

PROCESSORS = {
    "ViTImageProcessor": [{}, {"size": 224}, {"size": {"height": 240, "width": 240}, "do_normalize": False}],
    "DeiTImageProcessor": [{}, {"size": 256, "crop_size": 224}, {"do_center_crop": False, "size": 224}],
    "CLIPImageProcessor": [{}, {"size": 256, "crop_size": 224}],
    "BitImageProcessor": [{}, {"size": {"shortest_edge": 256}}],
    "SiglipImageProcessor": [{}],
}


@pytest.mark.parametrize(("name", "options"), [(name, each) for name, some in PROCESSORS.items() for each in some])
def test_images_are_prepared_as_by_the_processor_of_transformers(name, options, tmp_path):
    """Also of older files, in which one number stands for both sides."""
    processor = getattr(transformers, name).from_dict(options)
    if options.get("size") == 256:  # as older versions wrote it
        facts = {**processor.to_dict(), **options, "feature_extractor_type": name.replace("ImageProc", "FeatureExtrac")}
        facts["feature_extractor_type"] = name.replace("ImageProcessor", "FeatureExtractor")
        del facts["image_processor_type"]
    else:
        facts = processor.to_dict()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts, default=int))
    pixels = np.linspace(0, 255, 300 * 260 * 3).reshape(300, 260, 3).astype(np.uint8)
    pixels[100:180, 60:140] = (250, 20, 90)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    wanted = processor(Image.open(tmp_path / "image.png"), return_tensors="pt")["pixel_values"][0]
    found = _transformers_preprocessing(str(tmp_path), Preprocessing(size=tuple(wanted.shape[-2:])))
    assert (read_image(tmp_path / "image.png", found) - wanted).abs().mean() < 0.02


@pytest.mark.parametrize("name", ["hf Dinov2Model", "hf Dinov2 registers", "hf CLIPVisionModel", "hf ViT classifier"])
def test_a_saved_transformers_model_comes_back(name, tmp_path):
    model = convert(lively(FAMILIES[name]()), layers=[2, 4], ratio=[0.5, 0.25], selection="per_head")
    _comes_back(model, torch.randn(2, 3, 32, 32), tmp_path)


def test_a_saved_timm_model_made_in_python_comes_back(tmp_path):
    model = lively(timm.create_model("deit_tiny_patch16_224", img_size=64, num_classes=3))
    _comes_back(convert(model, layers=[2, 4], ratio=0.5), torch.randn(2, 3, 64, 64), tmp_path)


def test_an_unconverted_model_comes_back_too(tmp_path):
    _comes_back(load("quickstart"), torch.randn(2, 1, 28, 28), tmp_path)


def _comes_back(model, images, folder):
    wanted = outputs(model, images)
    save(model, folder / "saved")
    back = load(folder / "saved")
    assert torch.equal(outputs(back, images), wanted)
    assert getattr(back, "tosa_config", None) == getattr(model, "tosa_config", None)
    assert not list((folder / "saved").glob(".*"))


def test_a_model_that_could_not_be_rebuilt_is_not_saved(tmp_path):
    with pytest.raises(TosaError, match="cannot be read back"):
        save(timm.create_model("deit_tiny_patch16_224", embed_dim=48), tmp_path / "saved")
    assert not (tmp_path / "saved/config.json").exists()


def test_a_run_opens_at_another_image_size(quick_run):
    model = load(quick_run, img_size=56)
    assert model.tosa_origin.preprocessing.size == (56, 56)
    assert outputs(model, torch.randn(1, 1, 56, 56)).shape == (1, 10)
    assert adapter_of(load(quick_run)).preprocessing().size == (28, 28)


def test_an_image_size_that_patches_do_not_divide_is_refused(quick_run):
    with pytest.raises(UsageError, match="use 28×28 or 32×32"):
        load(quick_run, img_size=30)


@pytest.mark.parametrize("damage", ["weights", "config", "newer", "interrupted", "not json"])
def test_damaged_runs_are_refused_with_advice(damage, quick_run, tmp_path):
    import shutil

    run_folder = tmp_path / "run"
    shutil.copytree(quick_run, run_folder)
    config = json.loads((run_folder / "config.json").read_text())
    if damage == "weights":
        whole = (run_folder / "model.safetensors").read_bytes()
        (run_folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    elif damage == "config":
        config["convert"]["layers"] = [2]
        (run_folder / "config.json").write_text(json.dumps(config))
    elif damage == "newer":
        config["version"] = 99
        (run_folder / "config.json").write_text(json.dumps(config))
    elif damage == "interrupted":
        (run_folder / "config.json").unlink()
    else:
        (run_folder / "config.json").write_text("{")
    wanted = {
        "weights": "damaged",
        "config": "damaged",
        "newer": "newer",
        "interrupted": "--resume",
        "not json": "damaged",
    }
    with pytest.raises(TosaError, match=wanted[damage]):
        load(run_folder)


def test_a_full_disk_leaves_no_half_written_run(tmp_path, monkeypatch):
    model = convert(load("quickstart"), layers=[2])
    save(model, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}

    def full(*args, **kwargs):
        args[1].write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tosa_convert.runs.folder.save_file", full)
    with pytest.raises(TosaError, match="No space left on device"):
        save(copy.deepcopy(model), tmp_path / "run")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


CHANGES = {
    "classes": lambda model: model.reset_classifier(7),
    "no head": lambda model: model.reset_classifier(0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_model_changed_after_it_was_loaded_comes_back(change, tmp_path):
    """Found: it came back as it had been loaded, or not at all."""
    model = load("quickstart")
    change(model)
    model = convert(model, layers=[2], ratio=0.5, score="norm")
    _comes_back(model, torch.randn(2, 1, 28, 28), tmp_path)


def test_a_change_that_cannot_be_read_back_is_refused_where_it_is_saved(tmp_path):
    model = load("quickstart")
    model.reset_classifier(10, "avg")
    with pytest.raises(TosaError, match="changed after it was loaded"):
        save(convert(model, layers=[2], ratio=0.5, score="norm"), tmp_path / "run")


def test_a_model_without_its_pooler_loads_and_comes_back(tmp_path):
    """Its weights were called incomplete."""
    model = lively(transformers.ViTModel(transformers.ViTConfig(**HF_SMALL), add_pooling_layer=False))
    model.save_pretrained(tmp_path / "folder")
    images = torch.randn(2, 3, 32, 32)
    loaded = load(tmp_path / "folder")
    assert torch.equal(loaded(images).last_hidden_state, model(images).last_hidden_state)
    for each in (loaded, model):
        _comes_back(convert(each, layers=[2], ratio=0.5, score="norm"), images, tmp_path / str(id(each)))


def test_grey_images_have_one_mean(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, in_chans=1, num_classes=2)
    assert len(preprocessing_of(model).mean) == 1
    write_images(tmp_path / "images", 2)
    assert flops_on(convert(model, layers=[2], ratio=0.5), tmp_path / "images")["images"] == 2
    four = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, in_chans=4, num_classes=2)
    with pytest.raises(UsageError, match="4 channels"):
        flops_on(four, tmp_path / "images")
