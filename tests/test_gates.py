"""SPA's gates: what they select and weigh, and how they learn."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fashion_sample, write_images
from dense_models import depth_model, write_pairs
from gated_models import gated, photos, vit
from PIL import Image
from references import close, first
from torch.utils.checkpoint import checkpoint

from tosa_convert import FinetuneSettings, UsageError, convert, distill, finetune, load
from tosa_convert.data.images import Images
from tosa_convert.export.onnx import export_onnx
from tosa_convert.measure.evaluation import random_control
from tosa_convert.methods.score import View
from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.planning.comparison import compare
from tosa_convert.selective.selection import choosing_blocks, chosen_tokens, selective_blocks
from tosa_convert.training import finetuning
from tosa_convert.training.losses.gates import Gates


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


@pytest.mark.parametrize("options", [{}, {"ratio": 0.5}])
def test_gates_learn_alike_where_layers_are_checkpointed_together(options):
    """Found: run once more, the second of two gates took the model's last gate for the one before it."""
    images, found = photos(), []
    for together in (1, 2, 6):
        torch.manual_seed(0)
        model = gated(**options).eval()
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        for part in range(0, len(model.blocks), together):
            tokens = checkpoint(model.blocks[part : part + together], tokens, use_reentrant=False)
        model.norm(tokens).square().sum().backward()
        found.append(torch.cat([block.selector.linear.weight.grad.flatten() for block in choosing_blocks(model)]))
    assert close(found[1], found[0])
    assert close(found[2], found[0])


@pytest.mark.parametrize("options", [{}, {"ratio": 0.5}])
def test_a_control_weighs_what_it_adds_as_the_gates_do(options):
    images, model = photos(), gated(**options)
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
    with pytest.raises(UsageError, match="needs a GPU"):
        finetune(model, f"depth:{tmp_path}", FinetuneSettings(head_only=True, precision="fp16"), device="cpu")
    assert all(parameter.requires_grad for parameter in model.parameters()), "what is refused freezes nothing"
    finetune(model, f"depth:{tmp_path}", settings.model_copy(update={"head_only": True}))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in gates.items())


def test_spa_learns_where_masks_are(outlined, monkeypatch):
    ran = []
    monkeypatch.setattr(finetuning, "run", lambda model, images: ran.append(model) or run(model, images))
    model = convert(vit(), method="spa", start=0.0)
    settings = FinetuneSettings(steps=60, batch_size=8, lr=3e-3, gates=1.0, labels=0.0, logits=0.0, features=0.0)
    figures = finetune(model, outlined[0], settings.model_copy(update={"augment": "none"}), masks=outlined[1])
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


def test_without_masks_the_original_s_attention_is_the_label(outlined):
    with pytest.warns(match="what the original's last layer attends to"):
        figures = finetune(convert(vit(), method="spa"), outlined[0], FinetuneSettings(steps=2, batch_size=4))
    assert figures["gates"] > 0


def test_gates_are_not_distilled():
    with pytest.raises(UsageError, match="learns in finetune"):
        distill(convert(vit(), method="spa"))


def test_a_run_of_the_quickstart_model_keeps_its_gates(tmp_path):
    from tosa_convert import save

    model = convert(load("quickstart"), method="spa")
    save(model, tmp_path / "run")
    again = load(tmp_path / "run")
    images = torch.rand(3, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(first(run(again.eval(), images)), first(run(model.eval(), images)))
    assert adapter_of(again).blocks[-1].selector is not None


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


def test_gates_that_are_untrained_are_compared_as_such():
    found = compare(vit(), budgets=[0.85], methods=["spa"], images=4, runtime=None)
    assert "spa: its gates are untrained, so they choose by chance; finetune trains them" in found["notes"]
