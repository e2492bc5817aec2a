"""Images with their depth: how they are read, cropped and changed together, and what is wrong with them."""

import numpy as np
import pytest
import torch
from dense_models import depth_model, write_pairs
from PIL import Image

from tosa_convert import TosaError, UsageError, evaluate
from tosa_convert.data.dense import DenseImages, sizes_of
from tosa_convert.data.images import Augmentation, collate, loader
from tosa_convert.data.reader import read, with_options
from tosa_convert.models.preprocessing import Preprocessing

SEEN = Preprocessing(size=(32, 32))


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


def test_a_broken_depth_is_left_out_and_named(tmp_path):
    write_pairs(tmp_path, 3)
    (tmp_path / "depth" / "1.npy").write_bytes(b"no array")
    (batch,) = loader(DenseImages(f"depth:{tmp_path}", SEEN), 4)
    assert len(batch["images"]) == 2
    assert len(batch["broken"]) == 1
    assert batch["broken"][0].startswith("1.png (depth: ")
