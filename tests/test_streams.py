"""Data sets that come as a stream: seeded, begun anywhere, trained on, and broken in places."""

import json
from pathlib import Path

import pytest
import torch
from conftest import lively
from families import FAMILIES
from image_sources import NAMES, png, read

from tosa_convert import FinetuneSettings, UsageError, convert, evaluate, finetune, load
from tosa_convert.data.images import Images, training_loader
from tosa_convert.data.sampling import sample
from tosa_convert.export.onnx import export_onnx
from tosa_convert.models.provenance import preprocessing_of


def drawn(images, first: int, last: int, repeats: int = 1) -> list:
    batches = training_loader(images, 2, first, last, 0, repeats)
    return [(image, label) for batch in batches for image, label in zip(batch["images"], batch["labels"], strict=True)]


def test_a_stream_is_seeded_and_begins_anywhere(sources):
    images = read(sources, "hfids", augment="crop", seed=3)
    assert images.classes == list(NAMES)
    whole = drawn(images, 0, 18)
    assert sorted(label.item() for _, label in whole[:9]) == [0] * 3 + [1] * 3 + [2] * 3
    for first in (4, 8, 14):
        again = drawn(images, first, 18)
        assert all(torch.equal(ours[0], theirs[0]) for ours, theirs in zip(again, whole[first:], strict=True))
    assert not torch.equal(drawn(read(sources, "hfids", augment="crop", seed=4), 0, 2)[0][0], whole[0][0])
    twice = drawn(images, 0, 18, repeats=2)
    labels = [label.item() for _, label in twice]
    assert labels[::2] == labels[1::2] == [label.item() for _, label in whole[:9]]
    assert all(torch.equal(ours[0], theirs[0]) for ours, theirs in zip(drawn(images, 7, 18, 2), twice[7:], strict=True))


def test_a_stream_is_trained_and_measured_on(sources, tmp_path):
    if "hfids" not in sources:
        pytest.skip("datasets is not installed")
    model = lively(FAMILIES["timm vit"]())
    model.reset_classifier(3)
    convert(model, score="similarity", bypass="merge", layers=[3], ratio=0.5)
    figures = finetune(model, sources["hfids"], FinetuneSettings(steps=3, batch_size=2))
    assert figures["labels"] > 0
    assert evaluate(model, sources["hfids"])["models"] == evaluate(model, sources["hfds"])["models"]
    with pytest.raises(UsageError, match="which a stream has not; use hfds:"):
        export_onnx(model, tmp_path, sources["hfids"])
    preprocessing = preprocessing_of(model)
    stored, streamed = (sample(sources[kind], preprocessing, 9, crops=False) for kind in ("hfds", "hfids"))
    assert sorted(stored[2].tolist()) == sorted(streamed[2].tolist())
    few = sample(sources["hfids"], preprocessing, 4)[0]
    assert torch.equal(few, streamed[0][:4])
    assert any(torch.equal(few[0], each) for each in stored[0])
    stream = read(sources, "hfids", augment="crop")
    stream.reader.told = None  # as most streams come
    with pytest.raises(UsageError, match="give steps, not epochs"):
        len(stream)


def test_tokens_are_counted_on_a_stream(sources, tosa):
    if "hfids" not in sources:
        pytest.skip("datasets is not installed")
    options = ["quickstart", "--data", sources["hfids"], "--images", "4"]
    code, out, err = tosa("flops", *options, "--score", "norm", "--threshold", "4", "--layers", "2,4")
    assert (code, "4 images" in out) == (0, True), out + err


def test_labels_of_a_stream_are_looked_at_as_they_come(tmp_path):
    model = lively(FAMILIES["timm vit"]())
    with pytest.raises(UsageError, match="has label 7, and the model has 5 outputs"):
        evaluate(model, stream_of(tmp_path, [0, 1, 7, 2]))


def test_broken_images_of_a_stream_are_counted(tmp_path):
    model = lively(FAMILIES["timm vit"]())
    found = evaluate(model, stream_of(tmp_path, [0, 1, 2, 2, 1], broken=(1, 3)))
    assert (found["images"], len(found["broken"])) == (3, 2)


def test_a_broken_image_of_a_stream_is_passed_over_and_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": png(i) if i % 3 else b"broken", "path": f"{i}.png"} for i in range(6)]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    images = Images(f"hfids:{tmp_path}", preprocessing_of(FAMILIES["timm vit"]()), augment="none")
    batches = list(training_loader(images, 3, 0, 12, 0))
    assert [len(batch["images"]) for batch in batches] == [3] * 4
    assert sorted(name for batch in batches for name in batch["broken"]) == ["0.png", "0.png", "3.png", "3.png"]
    assert not images.labelled


def stream_of(tmp_path, labels: list, broken: tuple = ()) -> str:
    datasets = pytest.importorskip("datasets")
    stored = [{"bytes": b"broken" if i in broken else png(i), "path": None} for i in range(len(labels))]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Value("string" if "cat" in labels else "int64")}
    )
    rows = datasets.Dataset.from_dict({"image": stored, "label": labels}, features=features)
    rows.to_parquet(tmp_path / "train.parquet")
    return f"hfids:{tmp_path}"


def test_broken_images_of_a_stream_are_told_by_their_row(tmp_path):
    source = stream_of(tmp_path, [0] * 9, broken=(2, 7))
    figures = finetune(convert(load("quickstart"), ratio=0.5), source, FinetuneSettings(steps=6, batch_size=4))
    assert figures["broken"] == [f"{tmp_path}[2]", f"{tmp_path}[7]"]


def test_a_label_of_a_stream_beyond_the_outputs_is_one_line_and_what_was_learnt_is_kept(tmp_path):
    source = stream_of(tmp_path, [0] * 19 + [500])
    model = convert(load("quickstart"), ratio=0.5)
    settings = FinetuneSettings(steps=20, batch_size=1)
    with pytest.raises(UsageError, match=r"\[19\] has label 500, and the model has 10 outputs"):
        finetune(model, source, settings, seed=1, out=tmp_path / "out")
    assert (tmp_path / "out/checkpoint/step.json").exists()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, None, 1, -1], r"\[[13]\] has no label; set labels to 0"),
        ([-1] * 4, "has no label; set labels to 0"),
        (["dog", "cat", "dog", "cat"], "its labels are words, .* use hfds:.*, or set labels to 0"),
    ],
)
def test_a_stream_with_labels_that_do_not_count_is_trained_on_without_them(labels, message, tmp_path):
    source, model = stream_of(tmp_path, labels), convert(load("quickstart"), ratio=0.5)
    with pytest.raises(UsageError, match=message):
        finetune(model, source, FinetuneSettings(steps=4, batch_size=1, labels=1.0))
    assert finetune(model, source, FinetuneSettings(steps=4, batch_size=1, labels=0.0))["logits"] >= 0


def test_a_damaged_stream_is_one_line(tmp_path):
    source = stream_of(tmp_path, [0] * 4)
    (tmp_path / "train-2.parquet").write_bytes((tmp_path / "train.parquet").read_bytes()[:-200])
    with pytest.raises(UsageError, match=r"get it again|cannot be loaded"):
        finetune(convert(load("quickstart"), ratio=0.5), source, FinetuneSettings(steps=8, batch_size=4))


def test_thresholds_are_trained_and_counted_on_a_stream(tosa, tmp_path):
    source = stream_of(tmp_path, list(range(9)))
    recipe = {
        "model": "quickstart",
        "convert": {"method": "spa"},
        "finetune": {"steps": 1, "batch_size": 2, "labels": 0.0},
        "data": {"train": source, "eval": source},
    }
    Path("recipe.yaml").write_text(json.dumps(recipe))
    code, out, err = tosa("run", "recipe.yaml", "--out", "run")
    assert code == 0, err
    assert "9 images" in out
