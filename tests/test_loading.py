import io
import json
import os
import pickle
import warnings

import pytest
import timm
import torch
import transformers
from conftest import lively
from families import FAMILIES, HF_SMALL
from safetensors.torch import save_file

from tosa_convert import TosaError, UnsupportedModelError, UsageError, convert, load
from tosa_convert.base.errors import TosaWarning
from tosa_convert.models.adapter import run
from tosa_convert.models.loading import read_checkpoint, resolve_timm_name

TINY = "vit_tiny_patch16_224"


def outputs(model, images):
    with torch.no_grad():
        return next(iter(run(model, images).values()))


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("deit_tiny", "deit_tiny_patch16_224"),
        ("deit_tiny_patch16_224", "deit_tiny_patch16_224"),
        ("deit3_large_patch16_384", "deit3_large_patch16_384"),
    ],
)
def test_names_resolve(name, full):
    assert resolve_timm_name(name) == full


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_small", "ambiguous.*vit_small_patch16_224|ambiguous.*in all"),
        ("deittiny", "deit_tiny_patch16_224"),
        ("qqqqqqqqqqqq", "tosa-convert models"),
    ],
)
def test_names_that_do_not_resolve_list_the_nearest(name, message):
    with pytest.raises(UsageError, match=message):
        resolve_timm_name(name)


def test_the_quickstart_model_is_the_one_that_was_measured():
    model = load("quickstart")
    assert model.num_classes == 10
    assert model.tosa_origin.source == "quickstart"
    assert model.tosa_origin.preprocessing.channels == 1


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_timm_checkpoint_brings_its_own_head(suffix, tmp_path):
    torch.manual_seed(0)
    trained = timm.create_model(TINY, num_classes=7).eval()
    path = tmp_path / f"trained.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": {f"module.{key}": value for key, value in trained.state_dict().items()}}, path)
    else:
        save_file(trained.state_dict(), path)
    model = load(TINY, checkpoint=path)
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(outputs(model, images), outputs(trained, images))
    assert model.tosa_origin.checkpoint == str(path)


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    path = tmp_path / "hostile.pth"
    path.write_bytes(pickle.dumps(Hostile()))
    torch.save({"state_dict": Hostile()}, tmp_path / "zipped.pth")
    for name in ("hostile.pth", "zipped.pth"):
        with pytest.raises(TosaError, match="cannot read"):
            load(TINY, checkpoint=tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_a_hostile_pickle_in_a_timm_folder_is_refused_before_timm_sees_it(tmp_path, monkeypatch):
    """timm loads what is no safetensors file itself, in older releases with the code in it."""
    folder = tmp_path / "folder"
    model = timm.create_model(TINY, num_classes=3)
    timm.models.save_for_hf(model, folder, model_args={"num_classes": 3}, safe_serialization=False)
    loaded = load(folder)
    assert torch.equal(loaded.head.weight, model.head.weight)
    (weights,) = folder.glob("*.bin")
    torch.save(torch.nn.Linear(2, 2), folder / "training_args.bin")  # which nobody opens
    assert torch.equal(load(folder).head.weight, model.head.weight)
    (folder / "training_args.bin").unlink()
    monkeypatch.setattr(timm, "create_model", None)
    for name in (weights.name, "w.pth.tar"):
        weights.unlink(missing_ok=True)
        torch.save({"head.weight": torch.nn.Linear(2, 2)}, folder / name)
        with pytest.raises(TosaError, match="running its code is refused"):
            load(folder)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_truncated_checkpoint_is_refused(suffix, tmp_path):
    whole = io.BytesIO()
    torch.save({"head.weight": torch.ones(100, 100)}, whole)
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    with pytest.raises(TosaError, match="truncated"):
        read_checkpoint(path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(TosaError, match="does not fit"):
        load("deit_small_patch16_224", checkpoint=tmp_path / "other.safetensors")
    save_file({"something": torch.ones(2)}, tmp_path / "strange.safetensors")
    with pytest.raises(TosaError, match="does not fit"):
        load(TINY, checkpoint=tmp_path / "strange.safetensors")


def test_a_missing_checkpoint_or_folder_is_named(tmp_path):
    with pytest.raises(UsageError, match="no checkpoint file"):
        load(TINY, checkpoint=tmp_path / "none.pth")
    with pytest.raises(UsageError, match="no folder"):
        load(str(tmp_path / "none"))
    with pytest.raises(UsageError, match=r"config\.json"):
        load(tmp_path)


def test_an_unreachable_hub_says_what_to_do():
    with pytest.raises(TosaError, match="--checkpoint FILE"):
        load("deit_tiny")
    with pytest.raises(TosaError, match="local folder"):
        load("hf:some-org/some-model")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "within windows"),
        ("xcit_nano_12_p16_224", "channels"),
        ("resnet18", "not a ViT"),
        ("levit_128s", "hierarchical"),
        ("convit_tiny", "maps of its own"),
    ],
)
def test_models_that_cannot_be_converted_say_why(name, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        convert(timm.create_model(name))


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("SwinModel", {"embed_dim": 24, "depths": [1, 1], "num_heads": [3, 3], "image_size": 32}, "within windows"),
        ("SegformerModel", {}, "hierarchical"),
        ("SamVisionModel", {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}, "within windows"),
        ("TimmWrapperModel", {"architecture": "vit_tiny_patch16_224"}, "by its timm name"),
        ("ResNetModel", {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}, "not a ViT"),
        (
            "TimesformerModel",
            {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32},
            "along times and along places in turn",
        ),
    ],
)
def test_models_of_transformers_that_cannot_be_converted_say_why(kind, options, reason):
    config = getattr(transformers, kind.replace("Model", "Config"))(**options)
    with pytest.raises(UnsupportedModelError, match=reason):
        convert(getattr(transformers, kind)(config))


def test_a_family_seen_for_the_first_time_is_named_with_its_place():
    class NewBlock(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = torch.nn.MultiheadAttention(48, 3)

    model = FAMILIES["timm vit"]()
    model.blocks[3] = NewBlock()
    with pytest.raises(UnsupportedModelError, match=r"blocks\.3 is a NewBlock with MultiheadAttention"):
        convert(model)
    for index in range(6):
        model.blocks[index] = NewBlock()
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0 is a NewBlock .* not converted by guess"):
        convert(model)


def test_an_mae_that_hides_patches_says_what_to_do():
    model = FAMILIES["hf ViTMAEModel"]()
    model.config.mask_ratio = 0.75
    with pytest.raises(UnsupportedModelError, match="mask_ratio = 0"):
        convert(model)
    both = transformers.ViTMAEForPreTraining(model.config)
    with pytest.raises(UnsupportedModelError, match="2 rows of layers"):
        convert(both)


def test_a_pretrained_mae_is_loaded_as_an_encoder(tmp_path):
    config = transformers.ViTMAEConfig(**HF_SMALL, decoder_hidden_size=24, decoder_num_hidden_layers=2)
    config.decoder_num_attention_heads = 2
    transformers.ViTMAEForPreTraining(config).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert type(model).__name__ == "ViTMAEModel"
    images = torch.randn(2, 3, 32, 32)
    assert run(convert(model, layers=[2], ratio=0.5), images)["tokens"].shape == (2, 17, 48)


def test_a_head_that_the_checkpoint_has_not_got_is_said(tmp_path):
    file = tmp_path / "weights.pth"
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=3).state_dict(), file)
    with pytest.warns(TosaWarning, match="7 outputs is new and untrained"):
        assert load("vit_tiny_patch16_224", checkpoint=file, num_classes=7).num_classes == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load("vit_tiny_patch16_224", checkpoint=file, num_classes=0).num_classes == 0
        assert load("vit_tiny_patch16_224", checkpoint=file).num_classes == 3


def test_the_head_of_a_run_is_fixed(quick_run):
    with pytest.raises(UsageError, match="head of a run is fixed"):
        load(quick_run, num_classes=3)


def test_unknown_modules_and_text_models_are_refused():
    with pytest.raises(UnsupportedModelError, match="Linear"):
        convert(torch.nn.Linear(2, 2))
    bert = transformers.BertModel(
        transformers.BertConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    )
    with pytest.raises(UnsupportedModelError, match="BertModel"):
        convert(bert)


def test_a_transformers_folder_loads_with_its_preprocessing(tmp_path):
    model = lively(transformers.Dinov2Model(transformers.Dinov2Config(**HF_SMALL, mlp_ratio=2)))
    model.save_pretrained(tmp_path)
    facts = {"image_mean": [0.1, 0.2, 0.3], "size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts))
    loaded = load(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(outputs(loaded, images), outputs(model, images))
    preprocessing = loaded.tosa_origin.preprocessing
    assert preprocessing.mean == (0.1, 0.2, 0.3)
    assert preprocessing.crop_pct == 0.8


def test_a_damaged_transformers_folder_is_one_clear_error(tmp_path):
    lively(FAMILIES["hf Dinov2Model"]()).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(TosaError, match="damaged or incomplete"):
        load(tmp_path)


@pytest.mark.parametrize("given", ["deit_tiny", None, 3])
def test_what_is_no_model_is_told_how_to_get_one(given):
    with pytest.raises(UsageError, match="is no model"):
        convert(given)


def test_a_wrapped_model_names_what_it_wraps():
    with pytest.raises(UnsupportedModelError, match="wraps a VisionTransformer; convert that one before"):
        convert(torch.nn.DataParallel(load("quickstart")))
