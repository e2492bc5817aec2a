"""What people look at: which patches attend, features, the report of a run, the matrix of families."""

import base64
import copy
import io
import json
import re
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LAYERS, lively, write_images
from dense_models import write_pairs
from families import FAMILIES
from PIL import Image
from safetensors.numpy import load_file

from tosa_convert import UsageError, convert, load, original
from tosa_convert.cli.main import main
from tosa_convert.data.images import Images
from tosa_convert.export.features import write_features
from tosa_convert.models import supported
from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.reporting.token_maps import look, pixels
from tosa_convert.selective.selection import chosen_tokens


def tool(*arguments: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 0


@pytest.mark.parametrize("name", ["timm vit", "timm siglip", "timm dinov3", "hf DPT"])
@pytest.mark.parametrize("bypass", ["identity", "borrow", "merge"])
def test_a_view_shows_who_attended_and_who_stood_in(name, bypass, images):
    model = convert(lively(FAMILIES[name]()), score="similarity", bypass=bypass, layers={2: 0.7, 5: 0.4})
    seen = look(model, images)
    prefix = adapter_of(model).prefix
    for index, views in enumerate(seen):
        assert [view.layer for view in views] == [2, 5]
        for view in views:
            chosen = chosen_tokens(model)[view.layer][index, prefix:] - prefix
            wanted = torch.zeros(16).scatter(0, chosen, 1.0).reshape(4, 4)
            assert np.array_equal(view.attended, wanted)
            stand_ins = bypass != "identity"  # which gives the others nothing
            assert len(view.partners) == (16 - len(chosen)) * stand_ins
            assert all(not view.attended[skipped] and view.attended[partner] for skipped, partner in view.partners)


@pytest.mark.parametrize(("options", "left"), [
    ({"method": "tome", "ratio": 0.6}, None),
    ({"method": "evit", "ratio": 0.7}, None),
    ({"score": "norm", "bypass": "drop", "layers": [2, 4], "ratio": 0.5}, {2: 8, 4: 8}),
])  # fmt: skip
def test_patches_that_are_gone_stay_dark(options, left, images):
    model = convert(lively(FAMILIES["timm vit"]()), **options)
    for views in look(model, images):
        counts = [int(view.attended.sum()) for view in views]
        assert counts == sorted(counts, reverse=True)
        assert left is None or {view.layer: int(view.attended.sum()) for view in views}[2] == left[2]
        for before, after in pairwise(views):
            assert (after.attended <= before.attended).all()


def test_images_that_keep_different_numbers_are_seen_as_one_at_a_time(images):
    model = convert(lively(FAMILIES["timm vit"]()), score="norm", threshold=4.0, layers=[2, 4])
    together, alone = look(model, images), [look(model, image[None])[0] for image in images]
    assert len({view.attended.sum() for views in together for view in views}) > 1
    for ours, theirs in zip(together, alone, strict=True):
        assert [view.layer for view in ours] == [view.layer for view in theirs] == [2, 4]
        assert all((a.attended == b.attended).all() for a, b in zip(ours, theirs, strict=True))


def test_heads_that_choose_for_themselves_give_shares(images):
    model = convert(lively(FAMILIES["timm vit"]()), layers=[3], ratio=0.5, selection="per_head")
    shares = look(model, images)[0][0].attended
    assert shares.sum() == pytest.approx(8)
    assert set(np.round(shares * 3).flatten()) <= {0, 1, 2, 3}
    assert 0 < shares.max() <= 1


@pytest.mark.parametrize("name", ["timm features_only", "hf Dinov2Backbone", "hf DepthAnything"])
@pytest.mark.parametrize("method", ["tome", "evit", "mctf"])
def test_models_that_give_maps_get_every_token_back(name, method, images):
    model = lively(FAMILIES[name]())
    with torch.no_grad():
        wanted = run(model, images)
        found = run(convert(model, method=method, ratio=0.7), images)
    for output, value in wanted.items():
        assert found[output].shape == value.shape
        assert not torch.equal(found[output], value), output


def test_maps_have_every_token_in_its_place(images):
    """Those of one layer are its tokens, copied to where the tokens that they stand for are."""
    model = lively(FAMILIES["timm vit"]())
    wanted = model.forward_intermediates(images)[1]
    converted = convert(copy.deepcopy(model), method="tome", ratio=0.6)
    with torch.no_grad():
        last, maps = converted.forward_intermediates(images)
        groups = [block.selection.current.state.groups[layer + 1] for layer, block in enumerate(converted.blocks)]
        rows = converted.get_intermediate_layers(images, n=6)
    for ours, theirs in zip(maps, wanted, strict=True):
        assert ours.shape == theirs.shape
    for layer, (grid, few) in enumerate(zip(maps[:-1], rows[:-1], strict=True)):
        assert few.shape[1] < 16
        places = groups[layer].places[:, 1:] - 1
        again = torch.stack([few[image][places[image]] for image in range(len(few))])
        assert torch.allclose(grid.flatten(2).mT, again, atol=1e-5)
    assert torch.allclose(maps[-1].flatten(2).mT, rows[-1], atol=1e-5)
    assert torch.allclose(last, converted.forward_features(images), atol=1e-5)
    twin = original(converted)
    for ours, theirs in zip(twin.forward_intermediates(images)[1], wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_a_converted_mae_keeps_its_tokens_in_order(images):
    model = lively(FAMILIES["hf ViTMAEModel"]())
    converted = convert(model, score="similarity", bypass="merge", layers={3: 0.5})
    with torch.no_grad():
        wanted = run(converted, images)["tokens"]
        assert torch.equal(converted(images).last_hidden_state, wanted)
        assert torch.equal(converted(pixel_values=images).last_hidden_state, wanted)
    assert not any(module._forward_pre_hooks for module in original(converted).modules())


def test_nothing_is_drawn_of_an_unconverted_model(images):
    with pytest.raises(UsageError, match="not converted"):
        look(FAMILIES["timm vit"](), images)


def test_a_image_to_look_at_is_the_one_that_was_read(tmp_path):
    write_images(tmp_path, 1, size=28)
    preprocessing = preprocessing_of(load("quickstart"))
    image = Images(tmp_path, preprocessing)[0][0]
    grey = np.asarray(Image.open(next(tmp_path.iterdir())).convert("L")) / 255
    assert np.allclose(pixels(image, preprocessing), grey[..., None], atol=0.01)


@pytest.mark.parametrize(
    "name", ["timm vit", "timm cait", "timm features_only", "hf ViT classifier", "hf DepthAnything"]
)
def test_features_are_the_models_own(name, images):
    model = lively(FAMILIES[name]())
    adapter = adapter_of(model)
    found = adapter.tokens(images)
    assert found.shape == (3, adapter.prefix + 16, 48)
    if name == "timm vit":
        assert torch.equal(found, model.forward_features(images))
    elif name == "hf ViT classifier":
        assert torch.equal(found, model.vit(images).last_hidden_state)
    elif name == "timm features_only":
        assert torch.equal(found[:, 1:].mT.unflatten(-1, (4, 4)), model(images)[-1])


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_features_of_a_folder_are_those_of_its_images(ending, photos, tmp_path):
    model = convert(load("quickstart"), score="similarity", bypass="merge", layers={4: 0.5})
    (photos / "003.png").write_bytes(b"no image")
    results = write_features(model, photos, tmp_path / f"f{ending}", batch_size=3)
    images = Images(photos, preprocessing_of(model))
    good = [index for index in range(8) if index != 3]
    with torch.no_grad():
        wanted = adapter_of(model).tokens(torch.stack([images[index][0] for index in good]))
    found = load_file(results["file"]) if ending == ".safetensors" else dict(np.load(results["file"]))
    assert results["images"] == 7
    assert results["broken"] == ["003.png"]
    assert np.allclose(found["patches"], wanted[:, 1:].unflatten(1, (7, 7)), atol=1e-5)
    assert np.allclose(found["classes"], wanted[:, 0], atol=1e-5)
    if ending == ".npz":
        assert list(found["names"]) == [f"{index:03d}.png" for index in good]
        assert zipfile.ZipFile(results["file"]).testzip() is None
    half = write_features(model, photos, tmp_path / f"half{ending}", dtype="float16")
    found = load_file(half["file"]) if ending == ".safetensors" else np.load(half["file"])
    assert found["patches"].dtype == np.float16
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"f{ending}", f"half{ending}", "photos"])


def test_names_of_features_are_those_of_their_rows(tmp_path):
    """Also where a map cannot be read, and an image with it; where two have one name the place tells."""
    model = convert(load("quickstart", task="depth"), score="similarity", bypass="merge", layers={4: 0.5})
    write_pairs(tmp_path / "data", 4)
    np.save(tmp_path / "data/depth/1.npy", np.zeros((5, 9), np.float32))
    results = write_features(model, f"depth:{tmp_path / 'data'}", tmp_path / "f.npz", batch_size=3)
    found = np.load(tmp_path / "f.npz")
    assert list(found["names"]) == ["0.png", "2.png", "3.png"]
    assert len(found["patches"]) == results["images"] == 3


def test_features_that_cannot_be_written_leave_nothing(photos, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UsageError, match=r"neither \.npz nor"):
        write_features(load("quickstart"), photos, out / "f.csv")
    gone = convert(load("quickstart"), score="norm", bypass="drop", layers=[4], ratio=0.5)
    with pytest.raises(UsageError, match="removes patch tokens"):
        write_features(gone, photos, out / "f.npz")
    assert list(out.iterdir()) == []


def test_the_commands_draw_and_write(quick_run, photos, tmp_path, capsys):
    shown = tmp_path / "a.png"
    several = [part for name in ("000.png", "001.png") for part in ("--image", str(photos / name))]
    tool("show", str(quick_run), *several, "--out", str(shown), "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == ["000.png", "001.png"]
    assert found["attended"] == {str(layer): pytest.approx(25 / 49) for layer in LAYERS}
    assert Image.open(shown).size[0] > 400
    tool("flops", str(quick_run), "--plot", str(tmp_path / "b.png"))
    assert Image.open(tmp_path / "b.png").size[1] > 400
    tool("features", str(quick_run), "--images", str(photos), "--out", str(tmp_path / "f.npz"))
    tool("report", str(quick_run), "--out", str(tmp_path / "r.html"))
    page = (tmp_path / "r.html").read_text()
    encoded = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(encoded) == 2
    for text in encoded:
        Image.open(io.BytesIO(base64.b64decode(text))).verify()
    assert "http" not in re.sub(r'src="data[^"]+"', "", page), "it opens offline"
    assert "<h2>Recipe</h2>" in page
    assert page.index("<h2>Summary</h2>") < page.index("<h2>distill")
    assert "MACs saved" in page
    assert page.count("not measured (tosa-convert") == 3, "nothing but the MACs is known of this run"


def test_what_cannot_be_drawn_says_why(quick_run, tmp_path, capsys):
    for arguments, message in (
        (("show", "quickstart"), "not converted"),
        (("show", str(quick_run), "--ratio", "0.5"), "are fixed"),
        (("show", str(quick_run), "--image", str(tmp_path / "none.png")), "No such file"),
        (("show", str(quick_run), "--image", __file__), "not an image"),
        (("show", str(quick_run), "--out", "a.jpg"), "a.jpg is not a .png file"),
        (("report", "quickstart"), "is not a run"),
        (("report", str(quick_run.parent)), f"holds runs; name one of them: {quick_run.name}"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        assert stop.value.code != 0
        assert message in " ".join(capsys.readouterr().err.split())


def test_the_matrix_of_families_is_what_the_docs_show():
    readme = (Path(__file__).parent.parent / "docs/models.md").read_text()
    for row in supported.families():
        assert f"| {' | '.join(value for name, value in row.items() if name != 'names')} |" in readme, row


def test_a_bypass_that_removes_tokens_gives_no_maps(images):
    converted = convert(lively(FAMILIES["timm vit"]()), score="class_attention", bypass="drop", ratio=0.6)
    with pytest.raises(UsageError, match="removes patch tokens, so there are no maps"):
        converted.forward_intermediates(images)
    with pytest.raises(UsageError, match="never puts them back"):
        convert(FAMILIES["hf Dinov2Backbone"](), score="class_attention", bypass="drop", ratio=0.6)


@pytest.mark.parametrize(("method", "verb"), [("impact", "distill"), ("spa", "finetune")])
def test_what_has_learnt_nothing_yet_is_said(method, verb, tosa):
    for command in (("flops", "--images", 2), ("show",)):
        code, _, err = tosa(command[0], "quickstart", "--method", method, *command[1:])
        assert code == 0, err
        assert f"chosen by chance; {verb} quickstart first" in " ".join(err.split())
    code, _, err = tosa("flops", "quickstart", "--method", "tosa")
    assert "by chance" not in err, "it takes as much however it chooses"
