"""Depth: its figures against values worked out by hand, its readers, and what is wrong with data."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import lively
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from skimage.metrics import mean_squared_error
from test_dense import depth_model, write_pairs

from tosa_convert import FinetuneSettings, TosaError, UsageError, convert, evaluate, finetune, load
from tosa_convert.base.errors import TosaWarning
from tosa_convert.data.dense import DenseImages, sizes_of
from tosa_convert.data.images import BEYOND, Augmentation, collate, loader
from tosa_convert.data.reader import read, with_options
from tosa_convert.models.preprocessing import Preprocessing
from tosa_convert.planning.comparison import labelled_sample
from tosa_convert.tasks.depth import Depth, errors, silog_loss
from tosa_convert.tasks.relative_depth import RelativeDepth, aligned, aligned_errors

NAMES = tuple(Depth.metrics)
SEEN = Preprocessing(size=(32, 32))


def figures(found, truth) -> dict[str, float]:
    return dict(zip(NAMES, errors(torch.tensor(found), torch.tensor(truth)).tolist(), strict=True))


def test_every_error_is_what_hand_and_pencil_make_it():
    # Found 2 for 1 and 4 for 4: logarithms differ by ln 2 and 0, and the ratios are 2 and 1.
    assert figures([2.0, 4.0], [1.0, 4.0]) == pytest.approx(
        {
            "abs_rel": 0.5,
            "sq_rel": 0.5,
            "rmse": 0.5**0.5,
            "rmse_log": 0.490129,  # ln 2 / √2
            "log10": 0.150515,  # log10(2) / 2
            "silog": 34.657359,  # 100 · ln 2 / 2
            "delta1": 0.5,
            "delta2": 0.5,
            "delta3": 0.5,
        },
        rel=1e-5,
    )


def test_the_thresholds_are_strict_and_rise():
    found = figures([1.25, 1.5, 1.9, 3.0], [1.0, 1.0, 1.0, 1.0])
    assert (found["delta1"], found["delta2"], found["delta3"]) == (0.0, 0.5, 0.75)


def test_errors_are_those_of_another_implementation():
    generator = torch.Generator().manual_seed(0)
    found, truth = (torch.rand(200, generator=generator) * 9 + 0.5 for _ in range(2))
    mine = dict(zip(NAMES, errors(found, truth).tolist(), strict=True))
    assert mine["rmse"] ** 2 == pytest.approx(mean_squared_error(truth.numpy(), found.numpy()), rel=1e-5)
    assert mine["rmse_log"] ** 2 == pytest.approx(
        mean_squared_error(truth.log().numpy(), found.log().numpy()), rel=1e-5
    )
    assert mine["silog"] == pytest.approx(100 * np.std((found.log() - truth.log()).numpy()), rel=1e-4)
    assert mine["log10"] == pytest.approx(F.l1_loss(found.log10(), truth.log10()).item(), rel=1e-5)
    assert mine["abs_rel"] == pytest.approx(F.l1_loss(found / truth, torch.ones(200)).item(), rel=1e-5)


@given(st.lists(st.tuples(st.floats(0.1, 50), st.floats(0.1, 50)), min_size=2, max_size=30), st.floats(0.2, 5))
def test_silog_knows_no_scale_and_the_others_do(pairs, factor):
    found, truth = (torch.tensor(each) for each in zip(*pairs, strict=True))
    plain, scaled = (dict(zip(NAMES, errors(each, truth).tolist(), strict=True)) for each in (found, found * factor))
    assert scaled["silog"] == pytest.approx(plain["silog"], abs=0.1, rel=1e-3)
    perfect = dict(zip(NAMES, errors(truth, truth).tolist(), strict=True))
    assert perfect == {name: 1.0 if name.startswith("delta") else 0.0 for name in NAMES}


def test_the_loss_is_its_formula_where_the_depth_is_known():
    found, truth = torch.tensor([[2.0, 4.0, 9.0]]), torch.tensor([[1.0, 4.0, np.nan]])
    logs = torch.tensor([2.0, 1.0]).log()
    wanted = 10 * (logs.square().mean() - 0.85 * logs.mean() ** 2).sqrt()
    assert silog_loss(found, truth) == pytest.approx(wanted.item(), rel=1e-6)
    assert silog_loss(truth[:, :2], truth[:, :2]) < 1e-4


def test_the_loss_has_gradients_where_it_is_zero_and_where_nothing_is_known():
    for truth in (torch.ones(2, 3), torch.full((2, 3), np.nan)):
        found = torch.ones(2, 3, requires_grad=True)
        silog_loss(found, truth).backward()
        assert found.grad.isfinite().all()


def test_alignment_is_least_squares():
    generator = torch.Generator().manual_seed(1)
    found, wanted = (torch.rand(50, generator=generator) for _ in range(2))
    slope, shift = np.polyfit(found.numpy(), wanted.numpy(), 1)
    assert torch.allclose(aligned(found, wanted), slope * found + shift, atol=1e-5)


@given(st.floats(0.1, 20), st.floats(-3, 3))
def test_a_relative_map_is_right_at_any_scale_and_shift(scale, shift):
    truth = torch.linspace(0.5, 10, 40)
    assert aligned_errors(scale / truth + shift, truth)[0] < 1e-3


def test_aligned_figures_are_named_so():
    assert set(RelativeDepth.metrics) == {f"aligned_{name}" for name in NAMES}
    assert all("aligned" in metric.title for metric in RelativeDepth.metrics.values())


def test_a_map_is_scored_at_the_size_of_its_truth():
    truth = torch.full((2, 6, 8), 2.0)
    truth[1, 4:], truth[1, :, 5:] = BEYOND, BEYOND
    truth[0, 0, 0] = np.nan
    assert sizes_of(truth) == [(6, 8), (4, 5)]
    found = Depth().measure(torch.full((2, 1, 3, 3), 3.0), truth)
    assert found["abs_rel"].tolist() == [0.5, 0.5]
    unknown = torch.full((1, 6, 8), np.nan)
    assert Depth().measure(torch.full((1, 1, 3, 3), 3.0), unknown)["rmse"].isnan().all()


@pytest.mark.parametrize(("ending", "write"), [("npy", "npy"), ("pfm", "pfm"), ("png", "png")])
def test_depth_is_read_from_each_kind_of_file(tmp_path, ending, write):
    depth = np.array([[1.0, 2.5, 0.0], [4.0, 0.5, 10.0]], np.float32)
    (tmp_path / "images").mkdir()
    (tmp_path / "depth").mkdir()
    Image.new("RGB", (3, 2)).save(tmp_path / "images" / "a.jpg")
    file = tmp_path / "depth" / f"a.{ending}"
    if ending == "npy":
        np.save(file, depth)
    elif ending == "pfm":
        file.write_bytes(b"Pf\n3 2\n-1.0\n" + depth[::-1].tobytes())
    else:
        Image.fromarray((depth * 256).astype(np.uint16)).save(file)
    found = read(with_options(f"depth:{tmp_path}", scale=256 if ending == "png" else None)).map(0)
    assert np.isnan(found[0, 2])
    assert np.array_equal(np.nan_to_num(found), depth)


def kitti(root, size=(1242, 375)):
    """One image of KITTI with depth at every pixel, and its list."""
    image = root / "2011_09_26" / "drive" / "image_02" / "data" / "0.png"
    depth = root / "2011_09_26" / "drive" / "proj_depth" / "0.png"
    for file in (image, depth):
        file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(image)
    Image.fromarray(np.full(size[::-1], 256 * 20, np.uint16)).save(depth)
    (root / "list.txt").write_text(
        "2011_09_26/drive/image_02/data/0.png drive/proj_depth/0.png 721.5\n"
        "2011_09_26/drive/image_02/data/0.png None 721.5\n"
    )
    return f"kitti:{root}?list={root / 'list.txt'}"


def test_kitti_is_cropped_and_scored_as_is_customary(tmp_path):
    images = DenseImages(kitti(tmp_path), SEEN)
    image, truth, _ = images[0]
    assert image.shape == (3, 32, 32)
    assert truth.shape == (352, 1216)
    rows, columns = np.where(truth.isfinite())
    # Garg's rows 153 to 370 and columns 44 to 1196 of 375 × 1242, seen from the crop at (23, 13).
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (153 - 23, 370 - 23, 44 - 13, 1196 - 13)
    assert truth[200, 600] == 20.0
    assert images[1][1].isnan().all()  # no ground truth


def test_nyu_is_scored_within_eigens_crop_and_up_to_ten_metres(tmp_path):
    Image.new("RGB", (640, 480)).save(tmp_path / "rgb.jpg")
    depth = np.full((480, 640), 3000, np.uint16)
    depth[100, 100], depth[101, 101], depth[102, 102] = 0, 10000, 9999
    Image.fromarray(depth).save(tmp_path / "depth.png")
    (tmp_path / "list.txt").write_text("/rgb.jpg /depth.png 518.8579\n")
    truth = DenseImages(f"nyu:{tmp_path}?list={tmp_path / 'list.txt'}", SEEN)[0][1]
    rows, columns = np.where(truth.isfinite())
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (45, 470, 41, 600)
    assert truth[100, 100].isnan()
    assert truth[101, 101].isnan()
    assert truth[102, 102] == pytest.approx(9.999)


def test_relative_models_are_aligned_and_named_so(tmp_path):
    write_pairs(tmp_path, 3)
    model = lively(FAMILIES["hf DepthAnything"]())
    converted = convert(copy.deepcopy(model), score="similarity", bypass="merge", layers={2: 0.4})
    models = {"original": model, "converted": converted}
    found = evaluate(models, f"depth:{tmp_path}", reference="original")["models"]
    assert set(found["converted"]) == {*RelativeDepth.metrics, "map_error"}
    assert found["original"]["map_error"] == 0
    assert found["converted"]["map_error"] > 0
    with pytest.raises(UsageError, match="labels: 0"):
        finetune(converted, f"depth:{tmp_path}", FinetuneSettings(steps=1, labels=1.0), device="cpu")
    assert finetune(converted, f"depth:{tmp_path}", FinetuneSettings(steps=1), device="cpu")["maps"] > 0


def test_a_list_that_names_missing_files_names_ten_and_counts_all(tmp_path):
    (tmp_path / "list.txt").write_text("".join(f"{index}.jpg {index}.png 1\n" for index in range(8)))
    with pytest.raises(UsageError, match="names 16 files") as error:
        read(f"nyu:{tmp_path}?list={tmp_path / 'list.txt'}")
    assert "4.png and 6 more" in str(error.value)
    with pytest.raises(UsageError, match="--list FILE"):
        read(f"nyu:{tmp_path}")
    (tmp_path / "list.txt").write_text("only-an-image.jpg\n")
    with pytest.raises(UsageError, match="line 1 of"):
        read(f"nyu:{tmp_path}?list={tmp_path / 'list.txt'}")


def test_options_of_a_source_that_takes_none_are_refused(tmp_path):
    with pytest.raises(UsageError, match="--list goes with sources of maps"):
        with_options(str(tmp_path), list="list.txt")
    with pytest.raises(UsageError, match="--depth-scale goes with"):
        with_options("nyu:somewhere", scale=256)


def test_images_and_depths_turn_and_flip_together(tmp_path):
    """The image is drawn as a function of the depth, so the one can be told from the other afterwards."""
    depth = np.tile(np.linspace(1, 5, 64, dtype=np.float32), (48, 1)) + np.linspace(0, 3, 48, dtype=np.float32)[:, None]
    grey = (depth * 30).round().astype(np.uint8)
    write_pairs(tmp_path, [(np.stack([grey] * 3, -1), depth)])
    seen = SEEN.model_copy(update={"mean": (0.0,) * 3, "std": (1.0,) * 3})
    for kind in ("crop", "flip"):
        images = DenseImages(f"depth:{tmp_path}", seen, Augmentation(kind, (0.3, 1.0), degrees=40.0))
        drawn = [images[draw, 0] for draw in range(12)]
        assert any(not torch.equal(drawn[0][0], image) for image, *_ in drawn[1:])
        for image, truth, _ in drawn:
            assert image.shape == (3, 32, 32)
            known = truth.isfinite() & (image[0] > 0.05)
            assert known.float().mean() > 0.5
            apart = (image[0] * 255 / 30 - truth).abs()[known]
            assert apart.quantile(0.9) < 0.2


def test_the_same_seed_draws_the_same_images_and_maps(tmp_path):
    write_pairs(tmp_path, 3)
    first, again, other = (
        DenseImages(f"depth:{tmp_path}", SEEN, Augmentation("crop", photometric=True), seed)[4, 1] for seed in (0, 0, 1)
    )
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1].nan_to_num(), again[1].nan_to_num())
    assert not torch.equal(first[0], other[0])


def test_maps_of_different_sizes_make_a_batch():
    items = [(torch.zeros(3, 4, 4), torch.ones(2, 5), None), (torch.zeros(3, 4, 4), torch.ones(4, 3), None)]
    labels = collate(items)["labels"]
    assert labels.shape == (2, 4, 5)
    assert sizes_of(labels) == [(2, 5), (4, 3)]


def test_images_of_which_nothing_is_known_are_counted_and_left_out(tmp_path):
    write_pairs(tmp_path, 3)
    model = depth_model()
    whole = evaluate(model, f"depth:{tmp_path}", batch_size=2)
    np.save(tmp_path / "depth" / "1.npy", np.zeros((40, 48), np.float32))
    found = evaluate(model, f"depth:{tmp_path}", batch_size=2)
    assert (whole["unknown"], found["unknown"], found["images"]) == (0, 1, 3)
    one_by_one = [evaluate(model, f"depth:{tmp_path}", batch_size=size)["models"]["model"] for size in (1, 3)]
    assert one_by_one[0] == pytest.approx(one_by_one[1], rel=1e-4)
    assert found["models"]["model"] == pytest.approx(one_by_one[0], rel=1e-4)
    for index in (0, 2):
        np.save(tmp_path / "depth" / f"{index}.npy", np.zeros((40, 48), np.float32))
    with pytest.raises(TosaError, match="anything is known"):
        evaluate(model, f"depth:{tmp_path}")


def test_what_is_wrong_with_depth_is_said_in_a_line(tmp_path):
    model = depth_model()
    write_pairs(tmp_path / "size", 2)
    np.save(tmp_path / "size" / "depth" / "1.npy", np.ones((20, 24), np.float32))
    found = evaluate(model, f"depth:{tmp_path / 'size'}", workers=1)
    assert found["images"] == 1
    assert found["broken"] == ["1.png (depth: 20×24, but the image is 40×48)"]
    (tmp_path / "size" / "depth" / "1.npy").write_bytes(b"")
    assert "it is no array, or is damaged" in evaluate(model, f"depth:{tmp_path / 'size'}")["broken"][0]
    np.save(tmp_path / "size" / "depth" / "0.npy", np.ones((20, 24), np.float32))
    with pytest.raises(TosaError, match=r"not one of the 2 images .* 0\.png \(depth: 20×24"):
        evaluate(model, f"depth:{tmp_path / 'size'}")
    write_pairs(tmp_path / "scale", 2)
    for index in range(2):
        Image.fromarray(np.full((40, 48), 20, np.uint16)).save(tmp_path / "scale" / "depth" / f"{index}.png")
        (tmp_path / "scale" / "depth" / f"{index}.npy").unlink()
    with pytest.raises(UsageError, match=r"median depth of .* is 0.02 m.*--depth-scale"):
        evaluate(model, f"depth:{tmp_path / 'scale'}")
    assert evaluate(model, f"depth:{tmp_path / 'scale'}?scale=10")["images"] == 2
    for scale in ("0", "x", "-3"):
        with pytest.raises(UsageError, match="above 0"):
            read(f"depth:{tmp_path / 'scale'}?scale={scale}")
    write_pairs(tmp_path / "missing", 2)
    (tmp_path / "missing" / "depth" / "0.npy").unlink()
    with pytest.raises(UsageError, match=r"nothing for 1 of 2 images: 0\.png"):
        read(f"depth:{tmp_path / 'missing'}")
    (tmp_path / "half" / "images").mkdir(parents=True)
    with pytest.raises(UsageError, match="no folder depth/"):
        read(f"depth:{tmp_path / 'half'}")


def test_depth_of_eight_bits_and_maps_of_another_kind_are_told(tmp_path):
    write_pairs(tmp_path / "depth", 2)
    (tmp_path / "depth" / "depth" / "0.npy").unlink()
    Image.fromarray(np.full((40, 48), 200, np.uint8)).save(tmp_path / "depth" / "depth" / "0.png")
    found = evaluate(depth_model(), f"depth:{tmp_path / 'depth'}")
    assert found["broken"] == ["0.png (depth: 8 bits, in place of 16)"]
    write_pairs(tmp_path / "masks", 2, folder="masks")
    with pytest.raises(UsageError, match="has masks, and this model gives depth; give depth with nyu:"):
        evaluate(depth_model(), f"masks:{tmp_path / 'masks'}")


def test_depth_beyond_the_reach_of_the_head_is_said(tmp_path):
    write_pairs(tmp_path, [(np.zeros((40, 48, 3), np.uint8), np.full((40, 48), 25.0, np.float32))])
    with pytest.warns(TosaWarning, match="100% of the depth of .* is further than the 10 m"):
        evaluate(depth_model(), f"depth:{tmp_path}")


def test_a_model_that_is_its_own_original_has_nothing_to_learn_without_labels(tmp_path):
    write_pairs(tmp_path, 2)
    for model, data in ((depth_model(), tmp_path / "images"), (load("quickstart"), f"depth:{tmp_path}")):
        with pytest.raises(UsageError, match="nothing is left to learn: at ratio 1"):
            finetune(convert(model, ratio=1.0), data, FinetuneSettings(steps=1), device="cpu")


def test_comparing_takes_no_more_images_than_have_maps(tmp_path):
    write_pairs(tmp_path, 3)
    samples, _, truths = labelled_sample(depth_model(), f"depth:{tmp_path}", 24)
    assert len(samples) == len(truths) == 3


def test_a_broken_depth_is_left_out_and_named(tmp_path):
    write_pairs(tmp_path, 3)
    (tmp_path / "depth" / "1.npy").write_bytes(b"no array")
    (batch,) = loader(DenseImages(f"depth:{tmp_path}", SEEN), 4)
    assert len(batch["images"]) == 2
    assert len(batch["broken"]) == 1
    assert batch["broken"][0].startswith("1.png (depth: ")


def test_a_head_learns_depth(tmp_path):
    """The image says how far everything is; a head that learns finds out."""
    pairs = []
    for index in range(4):
        far = 1.0 + 2 * index
        pairs.append((np.full((40, 48, 3), 40 * index + 20, np.uint8), np.full((40, 48), far, np.float32)))
    write_pairs(tmp_path, pairs)
    model = convert(depth_model(), ratio=1.0)
    before = evaluate(model, f"depth:{tmp_path}")["models"]["model"]["abs_rel"]
    settings = FinetuneSettings(steps=40, batch_size=4, lr=5e-3, augment="none", head_only=True)
    weights = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    found = finetune(model, f"depth:{tmp_path}", settings, device="cpu")
    assert all(torch.equal(value, weights[name]) for name, value in model.encoder.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.encoder.parameters())
    assert found["labels"] > 0
    assert evaluate(model, f"depth:{tmp_path}")["models"]["model"]["abs_rel"] < 0.5 * before


def test_without_labels_the_originals_maps_teach(tmp_path):
    write_pairs(tmp_path, 3)
    for index in range(3):
        (tmp_path / "depth" / f"{index}.npy").unlink()
    model = convert(depth_model(), score="similarity", bypass="merge", schedule="all", ratio=0.5)
    settings = FinetuneSettings(steps=2, batch_size=2, lr=1e-4)
    found = finetune(model, tmp_path / "images", settings, device="cpu")
    assert found["maps"] > 0
    assert found["features"] > 0
    assert json.dumps(found)
