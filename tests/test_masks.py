"""Selection labels of images: masks, boxes, and what is wrong with them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from dense_models import write_pairs
from gated_models import vit
from PIL import Image

from tosa_convert import FinetuneSettings, TosaError, UsageError, convert, finetune
from tosa_convert.base.errors import TosaWarning
from tosa_convert.data.dense import DenseImages
from tosa_convert.data.images import Augmentation, Images
from tosa_convert.data.masks import Boxes, MaskFolder, masks_of
from tosa_convert.models.preprocessing import Preprocessing


@pytest.mark.parametrize("kind", ["crop", "flip", "none"])
@pytest.mark.parametrize("place", [1, 2])
def test_masks_and_boxes_go_along_with_their_images(outlined, kind, place):
    preprocessing = Preprocessing(size=(32, 32), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    images = Images(outlined[0], preprocessing, Augmentation(kind), seed=3)
    plain = Images(outlined[0], preprocessing, Augmentation(kind), seed=3)
    images.masks = (MaskFolder, Boxes)[place - 1](outlined[place])
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
def test_selection_labels_that_make_no_sense(outlined, options, message):
    settings = FinetuneSettings(steps=1, batch_size=4, **options.pop("settings", {}))
    model = convert(vit(), **options.pop("convert", {"method": "spa"}))
    files = {name: outlined[place] if isinstance(place, int) else place for name, place in options.items()}
    with pytest.raises(UsageError, match=message):
        finetune(model, outlined[0], settings, **files)


def test_masks_that_do_not_fit(outlined, tmp_path):
    folder = MaskFolder(outlined[1])
    with pytest.raises(UsageError, match=r"nothing for 1 of 2 images: new.png"):
        folder.check(["000.png", "new.png"])
    with pytest.raises(TosaError, match="is 32×32 and the image 28×28"):
        folder.mask("000.png", (28, 28))
    with pytest.raises(TosaError, match="outside the image of 10×10"):
        Boxes(outlined[2]).mask("000.png", (10, 10))
    assert masks_of(None, None) is None


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
    with pytest.raises(TosaError, match=r"the boxes of 0.jpg are of an image of 40×30, and it is 80×60"):
        Boxes(tmp_path / "boxes.json").mask("0.jpg", (80, 60))
    content["annotations"][0]["bbox"] = [40, 5, 1, 5]  # next to it, within the pixel that rounding may take
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(TosaError, match="outside the image of 40×30"):
        Boxes(tmp_path / "boxes.json")
    content["annotations"][0]["bbox"] = [30, 5, 12, 5]
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(TosaError, match="a box of 0, 30,5 12×5, is outside the image of 40×30"):
        Boxes(tmp_path / "boxes.json")


@pytest.mark.parametrize("content", ["[]", "{", '{"images": []}'])
def test_what_is_no_coco_file_says_so(tmp_path, content):
    (tmp_path / "boxes.json").write_text(content)
    with pytest.raises(UsageError, match="no COCO file"):
        Boxes(tmp_path / "boxes.json")


def test_a_box_of_an_image_that_is_not_listed_is_named(tmp_path):
    content = {"images": [], "annotations": [{"image_id": 777, "bbox": [0, 0, 5, 5]}]}
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="a box is of image 777, which is not among its images"):
        Boxes(tmp_path / "boxes.json")


def test_masks_are_found_whatever_the_case_of_their_names(outlined):
    folder = outlined[1]
    for file in list(folder.rglob("*.png")):
        file.rename(file.with_suffix(".PNG"))
    assert MaskFolder(folder).files


def test_selection_labels_that_are_given_take_the_place_of_a_runs(outlined, tosa):
    images, masks, boxes = outlined
    other = shutil.copytree(images, images.with_name("other"))
    train = ("--data", images, "--steps", 1, "--batch-size", 4, "--teacher")
    code, _, err = tosa("finetune", "quickstart", "--method", "spa", *train, "--boxes", boxes, "--out", "run")
    assert code == 0, err
    for number, (options, kept) in enumerate(
        [
            ((), {"boxes"}),
            (("--masks", masks), {"masks"}),
            (("--gates", 0), set()),
            (("--data", images), {"boxes"}),  # the same ones
            (("--data", other), set()),
            (("--data", images, "--masks", masks), {"masks"}),
        ]
    ):
        code, _, err = tosa("finetune", "run", "--steps", 1, "--batch-size", 4, *options, "--out", number)
        assert code == 0, err
        data = yaml.safe_load(Path(str(number), "recipe.yaml").read_text())["data"]
        assert {each for each in ("masks", "boxes") if data.get(each)} == kept
