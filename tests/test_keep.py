"""What a plan keeps: logits, patches, pooled features or an embedding, a map."""

import copy
from dataclasses import replace

import onnxruntime
import pytest
import torch
from conftest import lively
from families import FAMILIES, HF_SMALL
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from transformers import BeitConfig, BeitForImageClassification, YolosConfig, YolosForObjectDetection

from tosa_convert import UsageError, convert, evaluate, find_plan
from tosa_convert.export.graph import write_graph
from tosa_convert.measure.similarity import Keep, error, losses, observe, settled_keep
from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.models.outputs import outputs_of, retrieval_agreement
from tosa_convert.planning import rivals
from tosa_convert.planning.comparison import mean_figures

PHOTOS = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def clip_tower() -> torch.nn.Module:
    """A tower with its projection as timm has it: a head with as many "classes" as the embedding is wide."""
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=512)
    model.pretrained_cfg = {"architecture": "vit_base_patch16_clip_224", "num_classes": 512}
    return lively(model)


def test_the_projection_of_a_clip_tower_is_no_classifier():
    model = clip_tower()
    assert list(run(model, PHOTOS)) == ["image_embeds"]
    assert outputs_of(model) == 0
    model.pretrained_cfg["architecture"] = "vit_base_patch16_224"
    assert list(run(model, PHOTOS)) == ["logits"]
    assert outputs_of(model) == 512
    fine_tuned = clip_tower()
    fine_tuned.reset_classifier(10)
    assert list(run(fine_tuned, PHOTOS)) == ["logits"]


def test_of_a_detector_everything_that_its_head_gives_is_kept(tmp_path):
    config = YolosConfig(**{**HF_SMALL, "image_size": [32, 32]}, num_detection_tokens=4, num_labels=3)
    model = lively(YolosForObjectDetection(config))
    assert {name: tuple(each.shape[1:]) for name, each in run(model, PHOTOS).items()} == {
        "class_logits": (4, 4),
        "pred_boxes": (4, 4),
    }
    assert settled_keep(observe(model, PHOTOS), None) is Keep.MAP
    converted = convert(copy.deepcopy(model), score="similarity", bypass="merge", layers={2: 0.5})
    assert error(observe(converted, PHOTOS), observe(model, PHOTOS), Keep.MAP).min() > 0
    write_graph(converted, tmp_path / "model.onnx", 20)
    names = [output.name for output in onnxruntime.InferenceSession(tmp_path / "model.onnx").get_outputs()]
    assert names == ["class_logits", "pred_boxes"]


def test_an_embedding_is_compared_by_cosine_and_by_what_is_nearest(photos):
    model = clip_tower()
    converted = convert(copy.deepcopy(model), score="similarity", bypass="merge", layers={2: 0.3})
    found = mean_figures(model, {"original": model, "converted": converted}, PHOTOS, None)
    assert found["original"]["pooled"] == pytest.approx(1)
    assert found["original"]["agreement"] == 1
    embeddings = [run(each, PHOTOS)["image_embeds"] for each in (model, converted)]
    cosines = torch.nn.functional.cosine_similarity(*embeddings)
    assert found["converted"]["pooled"] == pytest.approx(cosines.mean().item(), rel=1e-4)
    assert found["converted"]["agreement"] == pytest.approx(retrieval_agreement(*embeddings).mean().item())
    measured = evaluate({"original": model, "converted": converted}, photos, reference="original")
    assert set(measured["models"]["converted"]) == {"agreement", "cosine"}
    assert measured["models"]["original"]["agreement"] == 1


def test_the_nearest_other_image_decides():
    embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    swapped = embeddings[[0, 3, 2, 1]]
    assert retrieval_agreement(embeddings, 5 * embeddings).tolist() == [1, 1, 1, 1]
    assert retrieval_agreement(embeddings, swapped).sum() < 4
    assert retrieval_agreement(embeddings[:1], swapped[:1]).tolist() == [1]


@pytest.mark.parametrize(
    ("name", "keep", "others"),
    [
        ("timm vit", Keep.LOGITS, [Keep.PATCHES, Keep.POOLED]),
        ("hf Dinov2Model", Keep.PATCHES, [Keep.POOLED]),
        ("hf CLIPModel", Keep.PATCHES, [Keep.POOLED]),
        ("hf DepthAnything", Keep.MAP, [Keep.PATCHES, Keep.POOLED]),
    ],
)
def test_each_model_has_something_to_keep_and_an_error_of_it(name, keep, others, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(rivals, "lasting", lambda _: ["tome"])  # the others would only take time
    model = lively(FAMILIES[name]())
    converted = convert(copy.deepcopy(model), score="similarity", bypass="merge", layers={2: 0.4})
    wanted, found = observe(model, PHOTOS), observe(converted, PHOTOS)
    for each in (keep, *others):
        assert error(wanted, wanted, each).abs().max() < 1e-5
        assert (error(found, wanted, each) > 0).all()
        assert error(found, wanted, each).shape == (6,)
        assert torch.allclose(sum(losses(found, wanted, each)), error(found, wanted, each))
    assert find_plan(model, PHOTOS, 0.8).keep == keep.value


def test_logits_are_kept_by_the_features_that_they_are_made_from():
    """Of DeiT's distillation token too; where they are made from no features, by their KL."""
    for distilled in (False, True):
        options = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
        model = lively((VisionTransformerDistilled if distilled else VisionTransformer)(**options))
        converted = convert(copy.deepcopy(model), score="similarity", bypass="merge", layers={2: 0.4})
        wanted, found = observe(model, PHOTOS), observe(converted, PHOTOS)
        features = [each.forward_features(PHOTOS) for each in (converted, model)]
        heads = [each[:, :2].flatten(1) if distilled else each[:, 0] for each in features]
        cosines = torch.nn.functional.cosine_similarity(*heads)
        assert torch.allclose(error(found, wanted, Keep.LOGITS), 1 - cosines, atol=1e-5)
        bare = [replace(each, pooled=None) for each in (found, wanted)]
        kl = torch.nn.functional.kl_div(
            *(each.output.log_softmax(-1) for each in bare), reduction="none", log_target=True
        )
        assert torch.allclose(error(*bare, Keep.LOGITS), kl.sum(-1), atol=1e-6)


def test_what_was_measured_can_be_trained_afterwards():
    """transformers' BEiT keeps, for all models of a process, what it first made."""
    config = BeitConfig(
        **{**HF_SMALL, "image_size": 40, "patch_size": 8}, use_relative_position_bias=True, num_labels=3
    )
    model, photos = lively(BeitForImageClassification(config)), torch.randn(2, 3, 40, 40)
    observe(model, photos)
    run(model, photos)["logits"].sum().backward()
    assert model.classifier.weight.grad.abs().sum() > 0


def test_a_plan_keeps_what_it_is_asked_to(monkeypatch):
    monkeypatch.setattr(rivals, "lasting", lambda _: ["tome"])
    model = lively(FAMILIES["timm vit"]())
    for keep in ("logits", "pooled", "patches"):
        assert find_plan(model, PHOTOS, 0.8, keep=keep).keep == keep


@pytest.mark.parametrize(
    ("name", "keep", "message"),
    [
        ("hf Dinov2Model", "logits", "no logits of classes to keep"),
        ("timm vit", "map", "gives no map to keep"),
        ("hf IJepaModel", "nonsense", "choose patches, pooled, logits, map"),
    ],
)
def test_what_a_model_has_not_got_cannot_be_kept(name, keep, message):
    with pytest.raises(UsageError, match=message):
        find_plan(lively(FAMILIES[name]()), PHOTOS, 0.8, keep=keep)


def test_by_command(tosa, photos):
    code, _, err = tosa("plan", "quickstart", "--keep", "map", "--images", "4", "--out", "made")
    assert code == 2
    assert "gives no map to keep" in err


@pytest.mark.parametrize("name", FAMILIES)
def test_patches_are_told_from_prefix_tokens_in_every_family(name):
    """Whatever the model's own output looks like: pooled, or with tokens behind the patches."""
    torch.manual_seed(0)
    model = lively(FAMILIES[name]())
    adapter, images = adapter_of(model), PHOTOS[:2]
    seen = observe(model, images)
    count = adapter.patches((32, 32))
    assert seen.patches.shape[:2] == (2, count)
    with torch.no_grad():
        tokens = adapter.tokens(images)
    assert tokens.shape[:2] == (2, adapter.prefix + count)
    assert (seen.classes is None) == (not adapter.class_token)
