"""SPA's gates and their selection labels; token impact and its filter."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fashion_sample, lively, write_images
from families import FAMILIES, SMALL
from PIL import Image
from safetensors.torch import load_file
from test_contract import close, first
from test_dense import depth_model, write_pairs
from timm.models.vision_transformer import VisionTransformer

from tosa_convert import (
    DistillSettings,
    FinetuneSettings,
    TosaError,
    UsageError,
    convert,
    distill,
    finetune,
    load,
)
from tosa_convert.base.errors import InterruptedTrainingError, TosaWarning
from tosa_convert.data.dense import DenseImages
from tosa_convert.data.images import Augmentation, Images
from tosa_convert.data.masks import Boxes, MaskFolder, masks_of
from tosa_convert.export.onnx import export_onnx
from tosa_convert.measure.evaluation import random_control
from tosa_convert.measure.macs_share import MacsShare
from tosa_convert.methods.score import View
from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.models.preprocessing import Preprocessing
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.planning import comparison
from tosa_convert.planning.adaptive import at_mean
from tosa_convert.planning.comparison import compare
from tosa_convert.selective.selection import all_tokens, choosing_blocks, chosen_tokens, selective_blocks
from tosa_convert.tasks.task import task_of
from tosa_convert.training import finetuning
from tosa_convert.training import impact as impact_module
from tosa_convert.training.impact import FILE, impact_of
from tosa_convert.training.losses.gates import Gates


def photos(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def vit(**options) -> VisionTransformer:
    torch.manual_seed(0)
    return lively(VisionTransformer(**{**SMALL, **options}))


def gated(**options):
    """With gates that differ from token to token and image to image."""
    model = convert(vit(), **{"method": "spa", **options})
    generator = torch.Generator().manual_seed(5)
    for block in choosing_blocks(model):
        block.selector.linear.weight.data = torch.randn(block.selector.linear.weight.shape, generator=generator) / 4
        block.selector.linear.bias.data.fill_(0.3)
    return model


def test_a_pretrained_model_begins_as_it_was():
    model, images = vit(), photos()
    converted = convert(copy.deepcopy(model), method="spa", start=40.0)
    assert converted.tosa_config.threshold == 0.0
    assert converted.tosa_config.layers == [4, 5, 6], "the second half"
    assert close(first(run(converted, images)), first(run(model, images)))


@torch.no_grad()
@pytest.mark.parametrize("bypass", ["identity", "merge", "borrow"])
def test_a_gate_selects_by_the_higher_of_two_logits_and_weighs_what_a_layer_adds(bypass):
    model = gated(
        **({} if bypass == "identity" else {"method": None, "score": "gate", "bypass": bypass, "layers": [4, 5, 6]})
    )
    images, seen = photos(), {}
    for block in selective_blocks(model):
        hook = lambda _, given, output, layer=block.selection.layer: seen.update({layer: (given[0], output)})  # noqa: E731
        block.register_forward_hook(hook)
    run(model, images)
    before, skipped = torch.full((4, 17), -torch.inf), 0
    for block in selective_blocks(model):
        layer = block.selection.layer
        entered, left = seen[layer]
        before = torch.maximum(block.selector.linear(block.norm1(entered))[..., 0], before)
        for image, tokens in enumerate(chosen_tokens(model)[layer]):
            above = {token for token in range(1, 17) if before[image, token] >= 0}
            assert set(tokens.tolist()) == {0, *(above or {1 + before[image, 1:].argmax().item()})}
            others = [token for token in range(17) if token not in tokens]
            skipped += len(others)
            added, weights = left[image] - entered[image], before[image].sigmoid()
            if bypass == "identity":
                assert not added[others].any()
            else:  # the very update of one that attends, of its group
                assert all(torch.cdist(added[others], added[tokens]).min(1).values < 1e-5)
            if bypass != "merge":
                own = entered[image, tokens][None]
                assert close(added[tokens][None], weights[tokens][None, :, None] * (_plain(block, own) - own))
    assert skipped > 20


def _plain(block, tokens):
    tokens = tokens + block.drop_path1(block.ls1(block.attn(block.norm1(tokens))))
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))


@torch.no_grad()
def test_in_evaluation_a_batch_equals_its_images():
    model, images = gated(), photos()
    alone = torch.cat([first(run(model, image[None])) for image in images])
    assert close(first(run(model, images)), alone)
    assert len({len(tokens) for tokens in chosen_tokens(model)[4]}) > 1, "the images keep different numbers"


def test_gates_learn_from_the_task_and_from_labels():
    model, images = gated().train(), photos()
    torch.manual_seed(1)
    first(run(model, images)).square().sum().backward()
    for block in choosing_blocks(model):
        assert block.selector.linear.weight.grad.abs().sum() > 0
    model.zero_grad()
    state = choosing_blocks(model)[0].selection.current
    first(run(model, images))
    F.binary_cross_entropy_with_logits(state.state.gates[6], torch.ones(4, 17)).backward()
    assert choosing_blocks(model)[-1].selector.linear.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_a_gate_learns_most_where_it_decides(threshold):
    """The gradient of the hard choice is that of a sigmoid around the threshold, wherever that has been moved."""
    score = choosing_blocks(gated(threshold=threshold))[0].selector.train()
    view = View(steps=10_000, patches=16, grid=(4, 4), normed=torch.randn(2, 17, 48), threshold=threshold)
    torch.manual_seed(1)
    worth = score.worth(view)
    (found,) = torch.autograd.grad(worth.weights.sum(), worth.logits)
    slope = lambda values: values.sigmoid() * (1 - values.sigmoid())  # noqa: E731
    assert close(found, slope(worth.logits) + worth.logits.sigmoid() * slope(worth.values - threshold))


def test_gates_may_have_a_ratio_in_place_of_a_threshold():
    model, images = gated(ratio=0.5).train(), photos()
    current = choosing_blocks(model)[0].selection.current
    first(run(model, images)).square().sum().backward()
    assert all(block.selector.linear.weight.grad.abs().sum() > 0 for block in choosing_blocks(model))
    first(run(model.eval(), images))
    for block in choosing_blocks(model):
        layer = block.selection.layer
        best = current.state.gates[layer][:, 1:].topk(8).indices + 1
        assert torch.equal(current.state.choices[layer].attended[:, 1:].sort().values, best.sort().values)


def test_a_control_weighs_what_it_adds_as_the_gates_do():
    images, model = photos(), gated()
    control = random_control(model, seed=1)
    seen = {}
    for name, each in (("gates", model), ("control", control)):
        block = choosing_blocks(each)[0]

        def note(module, *_, name=name, block=block):
            state, layer = block.selection.current.state, block.selection.layer
            seen[name] = state.weights[layer].flatten()[state.choices[layer].attended[0]].sort().values

        block.attn.register_forward_hook(note)
        run(each, images)
    assert close(seen["control"], seen["gates"])
    assert not torch.equal(
        *(choosing_blocks(each)[0].selection.current.state.choices[4].attended for each in (model, control))
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"method": None, "score": "gate", "bypass": "merge", "layers": [4, 5, 6]}, marks=pytest.mark.long),
    ],
)
def test_the_file_of_a_gated_model(tmp_path, options):
    assert export_onnx(gated(**options), tmp_path).passed


@pytest.fixture
def labelled(tmp_path):
    """Images whose bright rectangle is the mask, and boxes that say the same."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    write_images(images, 6, ["a", "b", "c", "d", "e"])
    masks.mkdir()
    boxes: dict = {"images": [], "annotations": []}
    for number, file in enumerate(sorted(images.rglob("*.png"))):
        left, top = 4 + number % 5, 6 + number % 3
        pixels = np.zeros((32, 32, 3), np.uint8)
        pixels[top : top + 12, left : left + 14] = 255
        fresh = file.with_name(f"{number:03d}.png")
        file.unlink()
        Image.fromarray(pixels).save(fresh)
        Image.fromarray(pixels[..., 0]).save(masks / fresh.name)
        boxes["images"].append({"id": number, "file_name": f"x/{fresh.name}"})
        boxes["annotations"].append({"image_id": number, "bbox": [left, top, 14, 12]})
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    return images, masks, tmp_path / "boxes.json"


@pytest.mark.parametrize("kind", ["crop", "flip", "none"])
@pytest.mark.parametrize("place", [1, 2])
def test_masks_and_boxes_go_along_with_their_images(labelled, kind, place):
    preprocessing = Preprocessing(size=(32, 32), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    images = Images(labelled[0], preprocessing, Augmentation(kind), seed=3)
    plain = Images(labelled[0], preprocessing, Augmentation(kind), seed=3)
    images.masks = (MaskFolder, Boxes)[place - 1](labelled[place])
    for draw in range(8):
        image, same = images[draw, draw % len(images)][0], plain[draw, draw % len(plain)][0]
        assert torch.equal(image[:3], same), "the mask changes nothing about the image"
        brightness = image[0] * 0.2 + 0.4
        assert torch.allclose(brightness, image[3], atol=0.02)


@pytest.mark.parametrize("kind", ["crop", "flip", "none"])
@pytest.mark.parametrize("maps", [True, False])
def test_masks_go_along_with_images_and_their_maps(kind, maps, tmp_path):
    random, pairs = np.random.default_rng(0), []
    (tmp_path / "outlines").mkdir()
    for index in range(4):
        truth = np.zeros((40, 48), np.float32)
        top, left = random.integers(4, 20, 2)
        truth[top : top + 16, left : left + 16] = 1
        pairs.append((np.uint8(255 * np.stack([truth] * 3, -1)), truth + 1))
        Image.fromarray(np.uint8(255 * truth)).save(tmp_path / "outlines" / f"{index}.png")
    write_pairs(tmp_path, pairs)
    augment, source = Augmentation(kind, degrees=0.0), f"depth:{tmp_path}" if maps else tmp_path / "images"
    plain, images = (DenseImages(source, Preprocessing(size=(32, 32)), augment, seed=3) for _ in range(2))
    images.masks = MaskFolder(tmp_path / "outlines")
    for draw in range(8):
        (image, truth, _), (same, known, _) = images[draw, draw % 4], plain[draw, draw % 4]
        assert torch.equal(image[:3], same), "the mask changes nothing about the image"
        assert (image[3] - (truth - 1)).abs().mean() < 0.1 if maps else truth == known == -1
        assert ((image[0] > image[0].mean()).float() - image[3]).abs().mean() < 0.1


def test_a_thin_mask_of_a_large_image_is_not_lost_and_an_image_of_another_size_is_broken(tmp_path, monkeypatch):
    write_pairs(tmp_path, 1, size=(480, 640))
    (tmp_path / "outlines").mkdir()
    thin = np.zeros((480, 640), np.uint8)
    thin[:, 301] = 255
    Image.fromarray(thin).save(tmp_path / "outlines" / "0.png")
    images = DenseImages(f"depth:{tmp_path}", Preprocessing(size=(32, 32)), Augmentation("none"), seed=3)
    images.masks = MaskFolder(tmp_path / "outlines")
    assert images[0, 0][0][3].max() > 0.01
    monkeypatch.setattr(DenseImages, "frame", _refused)
    assert images._read(0)[2].startswith("0.png (depth: the image is")


def _refused(self, size):
    raise ValueError(f"the image is {size[1]}×{size[0]}")


def test_spa_of_a_dense_model_learns_from_masks_and_a_head_alone_leaves_its_gates(tmp_path, monkeypatch):
    write_pairs(tmp_path, 3, size=(32, 32))
    write_images(tmp_path / "outlines", 3)
    for file in sorted((tmp_path / "outlines").iterdir()):
        Image.open(file).convert("L").save(file.with_name(f"{int(file.stem)}.png"))
        file.unlink()
    seen, of = [], Gates.of
    monkeypatch.setattr(Gates, "of", lambda self, *given: (seen.append(self.masks), of(self, *given))[1])
    model, settings = convert(depth_model(), method="spa"), FinetuneSettings(steps=1, batch_size=2)
    finetune(model, f"depth:{tmp_path}", settings, masks=tmp_path / "outlines")
    assert seen[0].shape == (2, 32, 32)
    gates = {name: value.clone() for name, value in model.state_dict().items() if "selector" in name}
    finetune(model, f"depth:{tmp_path}", settings.model_copy(update={"head_only": True}))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in gates.items())


def test_spa_learns_where_masks_are(labelled, monkeypatch):
    ran = []
    monkeypatch.setattr(finetuning, "run", lambda model, images: ran.append(model) or run(model, images))
    model = convert(vit(), method="spa", start=0.0)
    settings = FinetuneSettings(steps=60, batch_size=8, lr=3e-3, gates=1.0, labels=0.0, logits=0.0, features=0.0)
    figures = finetune(model, labelled[0], settings.model_copy(update={"augment": "none"}), masks=labelled[1])
    assert figures["gates"] < 3 * 0.69 * 0.8, "better than by chance, over three layers"
    assert all(each is model for each in ran), "nobody asks the original"


@pytest.fixture
def silhouettes(tmp_path):
    """Real images, for training and for judging, and where their objects are: all around them is black."""
    with fashion_sample() as archive:
        names = archive.namelist()
        chosen = [name for split in ("train/", "test/") for name in [n for n in names if n.startswith(split)][:40]]
        archive.extractall(tmp_path / "fashion", [name for name in chosen if name.endswith(".png")])
    (tmp_path / "masks").mkdir()
    for file in (tmp_path / "fashion").rglob("*.png"):
        seen = np.asarray(Image.open(file)) > 16
        Image.fromarray((seen * 255).astype(np.uint8)).save(tmp_path / "masks" / file.name)
    return tmp_path / "fashion/train", tmp_path / "fashion/test", tmp_path / "masks"


def test_spa_on_real_images_and_their_silhouettes(tosa, silhouettes):
    train, test, masks = silhouettes
    teach = ("--masks", masks, "--gates", 1, "--steps", 30, "--batch-size", 16, "--lr", 3e-4)
    code, out, err = tosa(
        "finetune", "quickstart", "--method", "spa", "--data", train, *teach, "--mean-macs", 0.8, "--out", "run"
    )
    assert code == 0, err
    code, out, err = tosa("eval", "run", "--data", test, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["macs"]["least"] < found["macs"]["macs"] < found["macs"]["most"], "as many as each image needs"
    assert found["models"]["converted"]["top1"] > found["models"]["original"]["top1"] - 0.1
    model = load("run")
    images = Images(test, preprocessing_of(model))
    run(model, torch.stack([images[index][0] for index in range(len(images))]))
    of_patches = [
        np.asarray(Image.open(masks / Path(images.reader.filename(index)).name))
        .reshape(7, 4, 7, 4)
        .max((1, 3))
        .flatten()
        for index in range(len(images))
    ]
    hits = [of_patches[index][tokens[1:].numpy() - 1] > 0 for index, tokens in enumerate(chosen_tokens(model)[12])]
    chance = np.mean(np.stack(of_patches) > 0)
    assert np.concatenate(hits).mean() > chance + 0.05, "on images that it never saw too"


def test_a_filter_of_token_impact_is_the_only_one():
    with pytest.raises(UsageError, match=r"learns for one choice, .* here 3 layers choose; .*--method impact"):
        distill(convert(vit(), score="impact", layers=[2, 4, 6]), None, DistillSettings(steps=1))


def test_without_masks_the_original_s_attention_is_the_label(labelled):
    with pytest.warns(match="what the original's last layer attends to"):
        figures = finetune(convert(vit(), method="spa"), labelled[0], FinetuneSettings(steps=2, batch_size=4))
    assert figures["gates"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masks": "nowhere"}, "there is no folder of masks at nowhere"),
        ({"boxes": "nowhere"}, "there is no file of boxes at nowhere"),
        ({"masks": 1, "boxes": 2}, "leave out one of the two"),
        ({"masks": 1, "settings": {"mixup": 0.5}}, "crops and mirrors only"),
        ({"masks": 1, "convert": {"score": "norm"}}, "for score gate"),
        ({"masks": 1, "settings": {"gates": 0.0}}, "nothing is learnt from masks and boxes with gates 0"),
    ],
)
def test_selection_labels_that_make_no_sense(labelled, options, message):
    settings = FinetuneSettings(steps=1, batch_size=4, **options.pop("settings", {}))
    model = convert(vit(), **options.pop("convert", {"method": "spa"}))
    files = {name: labelled[place] if isinstance(place, int) else place for name, place in options.items()}
    with pytest.raises(UsageError, match=message):
        finetune(model, labelled[0], settings, **files)


def test_masks_that_do_not_fit(labelled, tmp_path):
    folder = MaskFolder(labelled[1])
    with pytest.raises(UsageError, match=r"nothing for 1 of 2 images: new.png"):
        folder.check(["000.png", "new.png"])
    with pytest.raises(TosaError, match="is 32×32 and the image 28×28"):
        folder.mask("000.png", (28, 28))
    with pytest.raises(TosaError, match="outside the image of 10×10"):
        Boxes(labelled[2]).mask("000.png", (10, 10))
    assert masks_of(None, None) is None


@torch.no_grad()
def test_impact_is_the_loss_without_a_token_less_the_loss_with_all():
    model, image = vit(), photos(1)
    converted = convert(copy.deepcopy(model), method="impact")
    for label in (2, None):
        found = impact_of(converted, task_of(converted), image, label)
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
    found = impact_of(clip, task_of(clip), photos(1), None)
    with torch.no_grad():
        doubled = copy.deepcopy(clip)
        doubled.visual_projection.weight *= 2
    assert torch.allclose(impact_of(doubled, task_of(doubled), photos(1), None).impact, found.impact, atol=1e-5)
    write_images(tmp_path / "images", 3)
    write_images(tmp_path / "masks", 3)
    for file in sorted((tmp_path / "masks").glob("*.png")):
        Image.fromarray((np.arange(32 * 32).reshape(32, 32) % 2 * 255).astype(np.uint8)).save(file)
    model = load("quickstart", task="segmentation")
    convert(model, method="impact")
    figures = distill(model, f"masks:{tmp_path}", DistillSettings(steps=2, examples=3, batch_size=2))
    assert figures["images"] == 3


def test_impact_in_half_precision(labelled):
    settings = DistillSettings(steps=2, examples=3, batch_size=2)
    assert distill(convert(vit(), method="impact").bfloat16(), labelled[0], settings)["images"] == 3
    with pytest.raises(UsageError, match="the weights are float16"):
        distill(convert(vit(), method="impact").half(), labelled[0], settings)


@pytest.mark.parametrize(("minutes", "kept"), [(1e-9, [0, 1, 2]), (5.0, [0, 0, 0])])
def test_impact_is_kept_as_often_as_checkpoints_are(tmp_path, labelled, monkeypatch, minutes, kept):
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
    distill(convert(vit(), method="impact"), labelled[0], settings, out=tmp_path / "run")
    assert found == kept
    assert (tmp_path / "run" / FILE).exists()


def test_what_was_worked_out_of_the_impact_outlives_an_interruption(tmp_path, labelled, monkeypatch):
    settings, work = DistillSettings(steps=2, examples=6, batch_size=4), impact_module.impact_of
    seen = []

    def interrupted(*given):
        if len(seen) == 4:
            raise KeyboardInterrupt
        seen.append(work(*given))
        return seen[-1]

    monkeypatch.setattr(impact_module, "impact_of", interrupted)
    with pytest.raises(InterruptedTrainingError, match=r"interrupted after 4 of 6 images; .* --out .* --resume"):
        distill(convert(vit(), method="impact"), labelled[0], settings, out=tmp_path / "run")
    seen.clear()
    assert distill(convert(vit(), method="impact"), labelled[0], settings, out=tmp_path / "run", resume=True)
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


def test_a_filter_learns_and_goes_on_where_it_was(tmp_path, labelled):
    settings = DistillSettings(steps=40, examples=10, batch_size=4)

    def learnt(out, resume=False):
        model = convert(vit(), method="impact")
        return distill(model, labelled[0], settings, out=out, resume=resume), model

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
def test_a_rho_that_tells_nothing_apart(labelled, options, message):
    with pytest.raises(UsageError, match=message):
        distill(convert(vit(), method="impact", **options), labelled[0], DistillSettings(steps=1, examples=3))


def test_gates_are_not_distilled():
    with pytest.raises(UsageError, match="learns in finetune"):
        distill(convert(vit(), method="spa"))


@pytest.mark.parametrize("method", ["spa", "impact"])
def test_thresholds_are_moved_to_a_mean(method):
    model, images = gated() if method == "spa" else convert(vit(), method="impact"), photos(6)
    found = at_mean(model, images, 0.85)
    share = MacsShare(vit()).of(found, images)
    assert 0.78 < share <= 0.85
    with pytest.raises(UsageError, match="give a higher budget"):
        at_mean(model, images, 0.01)
    with pytest.raises(UsageError, match="from 3 of them it cannot be seen how images differ; give 4 or more"):
        at_mean(model, images[:3], 0.85)
    with pytest.raises(UsageError, match="at_mean is for thresholds"):
        at_mean(convert(vit(), score="norm"), images, 0.5)


def test_thresholds_are_moved_to_a_mean_after_training(tosa, labelled):
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
        labelled[0],
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
    assert "even with the fewest tokens the mean is above 0.05 of the MACs" in err
    assert not Path("kept").exists(), "nothing was trained"
    for file in list(labelled[0].rglob("*.png"))[1:]:
        file.unlink()
    code, out, err = tosa(*train, "--mean-macs", 0.75, "--out", "one")
    assert code == 2
    assert "from 1 of them it cannot be seen how images differ" in err
    assert not Path("one").exists(), "nothing was trained"
    code, out, err = tosa(
        "finetune", "quickstart", "--score", "norm", "--steps", 1, "--mean-macs", 0.7, "--out", "none"
    )
    assert code == 2
    assert err.startswith("error: a mean of the MACs is for conversions with thresholds")
    assert not Path("none").exists()


def test_a_run_of_the_quickstart_model_keeps_its_gates(tmp_path):
    from tosa_convert import save

    model = convert(load("quickstart"), method="spa")
    save(model, tmp_path / "run")
    again = load(tmp_path / "run")
    images = torch.rand(3, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(first(run(again.eval(), images)), first(run(model.eval(), images)))
    assert adapter_of(again).blocks[-1].selector is not None


def test_masks_are_found_by_the_folders_of_their_images(tmp_path):
    for name, value in (("a", 0), ("b", 255)):
        (tmp_path / "masks" / name).mkdir(parents=True)
        Image.fromarray(np.full((4, 4), value, np.uint8)).save(tmp_path / "masks" / name / "0.png")
    folder = MaskFolder(tmp_path / "masks")
    folder.check(["a/0.jpg", "b/0.jpg"])
    assert np.asarray(folder.mask("a/0.jpg", (4, 4))).max() == 0
    assert np.asarray(folder.mask("b/0.jpg", (4, 4))).min() == 255
    (tmp_path / "flat").mkdir()
    Image.fromarray(np.eye(4, dtype=np.uint8)).save(tmp_path / "flat" / "0.png")
    flat = MaskFolder(tmp_path / "flat")
    assert np.asarray(flat.mask("a/0.jpg", (4, 4))).sum() == 4 * 255, "0 and 1 are labels"
    with pytest.raises(UsageError, match=r"has one 0 for a/0\.jpg, b/0\.jpg"):
        flat.check(["a/0.jpg", "b/0.jpg"])
    with pytest.raises(TosaError, match="is 4×4 and the image 5×4"):
        flat.look_at({"a/0.jpg": (5, 4)})
    flat.look_at({"a/0.jpg": (4, 4)})
    seen = np.zeros((4, 4, 4), np.uint8)
    seen[..., :3], seen[:2, :, 3] = 255, 255
    Image.fromarray(seen, "RGBA").save(tmp_path / "flat" / "0.png")
    assert np.asarray(flat.mask("a/0.jpg", (4, 4))).sum() == 8 * 255, "what nobody sees does not matter"
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "flat" / "0.png")
    with pytest.raises(UsageError, match="nothing matters in"):
        flat.look_at({"a/0.jpg": (4, 4)})
    (tmp_path / "flat" / "0.png").write_bytes(b"no image")
    with pytest.raises(TosaError, match="cannot read the mask"):
        flat.mask("0.jpg", (4, 4))


def test_masks_with_colours_matter_where_they_are_not_black(tmp_path):
    """As those of Pascal VOC: class 1 is (128, 0, 0)."""
    (tmp_path / "masks").mkdir()
    file, folder = tmp_path / "masks" / "0.png", None
    classes = np.array([[0, 1], [2, 255]], np.uint8)
    palette = Image.fromarray(classes, "P")
    palette.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + [0] * (252 * 3) + [224, 224, 192])
    palette.save(file)
    folder = MaskFolder(tmp_path / "masks")

    def seen():
        return (np.asarray(folder.mask("0", (2, 2))) > 0).tolist()

    assert seen() == [[False, True], [True, True]]
    palette.save(file, transparency=2)
    assert seen() == [[False, True], [False, True]], "what nobody sees does not matter"
    palette.convert("RGB").save(file)
    assert seen() == [[False, True], [True, True]]
    Image.fromarray(np.array([[0, 100], [200, 255]], np.uint8)).convert("P").save(file)
    assert seen() == [[False, False], [True, True]], "grey levels count from half on, however they are stored"


@pytest.mark.parametrize("box", [[1, 2], [0, 0, -1, 5], [0, 0, float("nan"), 5], [10, 10, -4, -4]])
def test_boxes_that_are_none(tmp_path, box):
    annotations = [{"image_id": 1, "bbox": box}]
    content = {"images": [{"id": 1, "file_name": "x/0.jpg"}], "annotations": annotations}
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"a box of x/0 is \["):
        Boxes(tmp_path / "boxes.json")
    (tmp_path / "boxes.json").write_text(json.dumps({**content, "annotations": []}))
    with pytest.raises(UsageError, match="no boxes at all"):
        Boxes(tmp_path / "boxes.json")


def test_boxes_without_area_count_for_nothing(tmp_path):
    """COCO's own training boxes have one."""
    content = {
        "images": [{"id": 1, "file_name": "0.jpg"}],
        "annotations": [{"image_id": 1, "bbox": box} for box in ([2, 2, 3, 0], [1, 1, 2, 2])],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.warns(TosaWarning, match="1 of 2 boxes have no area"):
        boxes = Boxes(tmp_path / "boxes.json")
    assert np.asarray(boxes.mask("0.jpg", (8, 8))).sum() == 4 * 255
    content["annotations"] = content["annotations"][:1]
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="no box has an area"):
        Boxes(tmp_path / "boxes.json")


def test_boxes_are_held_to_the_sizes_that_their_file_names(tmp_path):
    """Before any image is opened: a training would come to the last one late."""
    images = [{"id": 1, "file_name": "0.jpg", "width": 40, "height": 30}]
    content = {"images": images, "annotations": [{"image_id": 1, "bbox": [30, 5, 11, 5]}]}
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    assert Boxes(tmp_path / "boxes.json").mask("0.jpg", (40, 30)).getextrema() == (0, 255)
    content["annotations"][0]["bbox"] = [40, 5, 1, 5]  # next to it, within the pixel that rounding may take
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(TosaError, match="outside the image of 40×30"):
        Boxes(tmp_path / "boxes.json")
    content["annotations"][0]["bbox"] = [30, 5, 12, 5]
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(TosaError, match="a box of 0, 30,5 12×5, is outside the image of 40×30"):
        Boxes(tmp_path / "boxes.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "impact", "rho": 0.1, "kept": 0.3}, "leave out one of the two"),
        ({"score": "similarity", "relative": 0.5, "ratio": 0.5}, "relative goes with a threshold"),
    ],
)
def test_options_that_mean_nothing_together(options, message):
    with pytest.raises(UsageError, match=message):
        convert(vit(), **options)


def test_what_cannot_be_traced_or_exported_says_so():
    model, images = convert(vit(), score="norm", threshold=2.0, layers=[2, 4]), photos()
    with pytest.raises(TosaError, match="cannot be traced"):
        torch.jit.trace(model, (images[:1],), check_trace=False)
    with pytest.raises(Exception, match="give an example of batch 1"):
        torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert first(run(model, images[:0])).shape == (0, 5)


def test_impact_goes_by_the_output_where_labels_are_of_other_classes(tosa, labelled):
    train = ("distill", "quickstart", "--method", "impact", "--steps", 1, "--examples", 3, "--data", labelled[0])
    code, out, err = tosa(*train, "--out", "run")
    assert code == 0, err
    assert "labels are left out" in err
    assert "has 5 classes but the model has 10 outputs" in err
    code, out, err = tosa(*train, "--kept", 0.9, "--out", "run", "--resume")
    assert code == 2
    assert "run was started with other settings (convert.kept)" in err


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
def test_without_a_threshold_none_is_blamed(tosa, labelled, options):
    code, out, err = tosa("flops", "quickstart", *options, "--data", labelled[0], "--images", 3)
    assert code == 0, err
    assert "which all take the same" in " ".join(out.split())
    assert "reaches" not in out


@pytest.mark.parametrize("content", ["[]", "{", '{"images": []}'])
def test_what_is_no_coco_file_says_so(tmp_path, content):
    (tmp_path / "boxes.json").write_text(content)
    with pytest.raises(UsageError, match="no COCO file"):
        Boxes(tmp_path / "boxes.json")


def test_masks_are_found_whatever_the_case_of_their_names(labelled):
    folder = labelled[1]
    for file in list(folder.rglob("*.png")):
        file.rename(file.with_suffix(".PNG"))
    assert MaskFolder(folder).files


def test_gates_that_are_untrained_are_compared_as_such():
    found = compare(vit(), budgets=[0.85], methods=["spa"], images=4, runtime=None)
    assert "spa: its gates are untrained, so they choose by chance; finetune trains them" in found["notes"]


def test_what_is_learnt_by_ablation_is_learnt_once_for_all_budgets(labelled, monkeypatch):
    """And is the same as if it were learnt for each."""
    learnt, taught = [], comparison.distill

    def counted(model, *args, **kwargs):
        learnt.append(model)
        return taught(model, *args, **kwargs)

    monkeypatch.setattr(comparison, "DistillSettings", lambda steps: DistillSettings(steps=steps, examples=3, lr=0.1))
    monkeypatch.setattr(comparison, "distill", counted)
    settings = {"data": labelled[0], "images": 4, "runtime": None, "distill_steps": 2}
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


def test_containers_are_for_images_that_differ_in_number():
    with pytest.raises(UsageError, match="container goes with a threshold"):
        convert(load("quickstart"), score="norm", ratio=0.5, container=64)
