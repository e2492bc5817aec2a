"""Tar files, shards and datasets give what the folder gives that they were made of."""

import functools
import tarfile
from contextlib import suppress

import pytest
import torch
from conftest import check_resuming, lively, run_recipe
from families import FAMILIES
from image_sources import NAMES, add, png, read

from tosa_convert import FinetuneSettings, UsageError, convert, evaluate, finetune, load
from tosa_convert.base.errors import TosaWarning
from tosa_convert.data.images import Images, loader
from tosa_convert.data.sampling import sample
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.runs.metrics_log import read_metrics

FORMS = ("folder", "tar", "wds", "wds braces", "hfds")
READERS = ("tar", "wds", "hfds", "hfids")


@pytest.mark.parametrize("form", FORMS)
def test_every_source_gives_the_same_images_and_labels(form, sources):
    images, wanted = read(sources, form), read(sources, "folder")
    assert len(images) == 9
    assert images.labelled
    assert not images.ambiguous
    assert images.classes == (["0", "1", "2"] if form.startswith("wds") else list(NAMES))
    for index in range(9):
        (pixels, label, broken), (theirs, truth, _) = images[index], wanted[index]
        assert broken is None
        assert torch.equal(pixels, theirs)
        assert label == truth
        assert images.reader.filename(index)


@pytest.mark.parametrize("form", FORMS[1:])
def test_training_draws_the_same_images_from_every_source(form, sources):
    ours, theirs = (read(sources, each, augment="crop", seed=3) for each in (form, "folder"))
    for draw in ((0, 4), (7, 2)):
        assert torch.equal(ours[draw][0], theirs[draw][0])


@pytest.mark.parametrize("form", FORMS[1:])
def test_several_processes_read_one_source(form, sources):
    images = read(sources, form)
    alone, together = (torch.cat([batch["images"] for batch in loader(images, 2, workers)]) for workers in (0, 2))
    assert torch.equal(alone, together)


@pytest.mark.parametrize("form", FORMS[1:])
def test_they_stand_wherever_a_folder_does(form, sources, tmp_path):
    if form not in sources:
        pytest.skip("datasets is not installed")
    model = lively(FAMILIES["timm vit"]())
    model.reset_classifier(3)
    wanted, found = (evaluate(model, sources[each])["models"]["model"] for each in ("folder", form))
    assert found["top1"] == wanted["top1"]
    converted = convert(model, score="similarity", bypass="merge", layers=[3], ratio=0.5)
    figures = finetune(converted, sources[form], FinetuneSettings(steps=2, batch_size=2), out=tmp_path)
    assert figures["labels"] > 0
    assert len(sample(sources[form], preprocessing_of(model), 4)[0]) == 4


@pytest.mark.parametrize("form", READERS)
def test_a_killed_training_on_any_source_goes_on(form, sources, tmp_path, monkeypatch):
    if form not in sources:
        pytest.skip("datasets is not installed")
    settings = FinetuneSettings(steps=6, batch_size=2, labels=0, log_every=1, checkpoint_minutes=1e-9)
    train = functools.partial(finetune, data=sources[form], settings=settings, seed=5)
    check_resuming(train, lambda: convert(load("quickstart"), layers=[2, 4, 6], ratio=0.5), tmp_path, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("form", READERS)
def test_two_processes_learn_from_any_source_what_one_does(form, sources, tmp_path):
    if form not in sources:
        pytest.skip("datasets is not installed")
    recipe = f"""
model: quickstart
data: {{train: "{sources[form]}"}}
convert: {{score: norm, bypass: merge, layers: [2, 4, 6], ratio: 0.5}}
finetune: {{steps: 5, batch_size: BATCH, labels: 0, augment: none, log_every: 1, lr: 1.0e-6}}
"""
    losses = []
    for processes, batch in ((1, 4), (2, 2)):
        out = tmp_path / str(processes)
        run_recipe(recipe.replace("BATCH", str(batch)), out, processes)
        losses.append([line["loss"] for line in read_metrics(out / "finetune")])
    # 20 of 9 images, no two alike: the losses of the steps agree only where the same ones are in them.
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    assert len(losses[0]) == 5
    assert max(losses[0]) > 1.1 * min(losses[0])


def test_another_split_is_named(sources):
    if "hfds" not in sources:
        pytest.skip("datasets is not installed")
    assert len(read(sources, "hfds test")) == 3
    with pytest.raises(UsageError, match=r"has no split 'valid'; name one of .*train"):
        Images(sources["hfds"] + ":valid", preprocessing_of(FAMILIES["timm vit"]()))


def test_a_shard_that_lacks_the_last_class_still_has_labels(sources):
    model = lively(FAMILIES["timm vit"]())  # of five classes
    assert "top1" in evaluate(model, sources["wds"])["models"]["model"]
    model.reset_classifier(2)
    with pytest.raises(UsageError, match="has 3 classes but the model has 2 outputs"):
        evaluate(model, sources["wds"])


def test_broken_images_are_left_out_and_counted(tmp_path):
    content = png(0)
    with tarfile.open(tmp_path / "some.tar", "w") as archive:
        add(archive, "a/1.png", content)
        add(archive, "a/2.png", content[: len(content) // 2])
        add(archive, "b/3.png", b"")
    sources = [f"{kind}:{tmp_path / 'some.tar'}" for kind in ("tar", "wds")]
    with suppress(ImportError):
        import datasets

        rows = {"image": [{"bytes": each, "path": None} for each in (content, content[:-99], b"")]}
        stored = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()}))
        stored.to_parquet(tmp_path / "hub.parquet")
        sources.append(f"hfds:{tmp_path}")
    for source in sources:
        batch = next(iter(loader(Images(source, preprocessing_of(FAMILIES["timm vit"]())), 8)))
        assert len(batch["images"]) == 1
        assert len(batch["broken"]) == 2


def _shard(path, **files: bytes):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            add(archive, name.replace("_", "."), content)
    return path


def test_sources_that_cannot_be_read_say_why(tmp_path, sources):
    def refused(source: str, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            Images(source, preprocessing_of(FAMILIES["timm vit"]()))

    whole = _shard(tmp_path / "whole.tar", a_png=png(0), a_cls=b"1", b_png=png(1), b_cls=b"0").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "text.tar").write_bytes(b"no tar at all" * 100)
    refused(f"wds:{tmp_path / 'cut.tar'}", "the shard .*cut.tar is damaged")
    refused(f"tar:{tmp_path / 'cut.tar'}", "truncated, or no tar file")
    refused(f"wds:{tmp_path / 'text.tar'}", "the shard .*text.tar is damaged")
    header = whole.index(b"b.png")
    (tmp_path / "rot.tar").write_bytes(whole[:header] + b"c" + whole[header + 1 :])
    (tmp_path / "joined.tar").write_bytes(whole + whole)
    for name in ("rot", "joined"):  # tarfile takes either for the end
        refused(f"wds:{tmp_path / name}.tar", f"the shard .*{name}.tar is damaged .it is damaged in the middle, or sev")
        refused(f"tar:{tmp_path / name}.tar", "several tar files were joined")
    refused(f"tar:{tmp_path / 'none.tar'}", "there is no tar file at")
    refused(f"wds:{tmp_path / 'none'}", "there are no shards at .*none")
    refused(f"wds:{tmp_path}/part-{{00..03}}.tar", "there are no shards at .*part-00.tar")
    refused(
        f"wds:{_shard(tmp_path / 'words.tar', a_png=png(0), a_cls=b'cat')}", "a.cls .* holds no number as its label"
    )
    refused(f"wds:{_shard(tmp_path / 'empty.tar', a_txt=b'x')}", "contains no images")
    refused(f"tar:{tmp_path / 'empty.tar'}", "contains no images")
    half = Images(f"wds:{_shard(tmp_path / 'half.tar', a_png=png(0), a_cls=b'1', b_png=png(1))}",
                  preprocessing_of(FAMILIES["timm vit"]()))  # fmt: skip
    assert "half.tar/b.png has no label, unlike others" in half.ambiguous
    none = Images(f"wds:{_shard(tmp_path / 'none.tar', a_png=png(0), b_png=png(1))}",
                  preprocessing_of(FAMILIES["timm vit"]()))  # fmt: skip
    assert not none.labelled
    converted = convert(load("quickstart"), layers=[2], ratio=0.5)
    with pytest.raises(UsageError, match="has no labels"):
        finetune(converted, none.name, FinetuneSettings(steps=1, labels=1.0))
    if "hfds" in sources:
        refused(f"hfds:{tmp_path / 'nowhere'}", "the dataset .*nowhere cannot be loaded")


def test_folders_in_a_tar_file_are_classes_where_they_can_be(tmp_path):
    def opened(*names):
        with tarfile.open(tmp_path / "some.tar", "w") as archive:
            for index, name in enumerate(names):
                add(archive, name, png(index))
        return Images(f"tar:{tmp_path / 'some.tar'}", preprocessing_of(FAMILIES["timm vit"]()))

    assert opened("./a/1.png", "./b/1.png").classes == ["a", "b"]
    assert not opened("./1.png", "./2.png").classes  # as by tar cf some.tar -C folder .
    twice = opened("train/a/1.png", "train/b/1.png", "val/a/1.png")
    assert "two folders have the same name" in twice.ambiguous
    stray = opened("./a/1.png", "./1.png")
    assert "next to the class folders" in stray.ambiguous
    assert not stray.labelled


def hub(tmp_path, name: str, **columns):
    """A folder of parquet with images and these columns, {name: (feature, values)}."""
    datasets = pytest.importorskip("datasets")
    count = len(next(iter(columns.values()))[1])
    rows = {"image": [{"bytes": png(index), "path": None} for index in range(count)]}
    features = {"image": datasets.Image()}
    for column, (feature, values) in columns.items():
        rows[column], features[column] = values, feature(datasets)
    folder = tmp_path / name
    folder.mkdir()
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(folder / "train.parquet")
    return Images(f"hfds:{folder}", preprocessing_of(FAMILIES["timm vit"]()))


def test_the_column_of_labels_is_the_one_that_is_called_so(tmp_path):
    def classes(*names):
        return lambda datasets: datasets.ClassLabel(names=list(names))

    two = hub(tmp_path, "two", coarse=(classes("a", "b"), [0, 1]), label=(classes("x", "y", "z"), [2, 1]))
    assert two.classes == ["x", "y", "z"]
    assert [two.label(0), two.label(1)] == [2, 1]
    for kind in ("string", "large_string"):
        words = hub(tmp_path, kind, label=(lambda datasets, kind=kind: datasets.Value(kind), ["dog", "cat", "dog"]))
        assert words.classes == ["cat", "dog"]
        assert [words.label(index) for index in range(3)] == [1, 0, 1]
    truths = hub(tmp_path, "truths", label=(lambda datasets: datasets.Value("bool"), [True, False]))
    assert [truths.label(index) for index in range(2)] == [1, 0]
    with pytest.warns(TosaWarning, match="the column 'label' is of type float64, which says no class"):
        assert not hub(tmp_path, "floats", label=(lambda datasets: datasets.Value("float64"), [0.5, 1.0])).labelled
    numbers = hub(tmp_path, "numbers", label=(lambda datasets: datasets.Value("int64"), [0, 3]))
    assert numbers.classes == ["0", "1", "2", "3"]


@pytest.mark.parametrize("missing", [None, -1])
def test_images_without_a_label_among_others_are_told(missing, tmp_path):
    def named(datasets):
        return datasets.ClassLabel(names=["a", "b"])

    some = hub(tmp_path, "some", label=(named, [0, missing, 1]))
    assert "[1] has no label, unlike others" in some.ambiguous
    assert not some.labelled
    none = hub(tmp_path, "none", label=(named, [missing, missing]))
    assert not none.labelled
    assert not none.ambiguous


def test_what_belongs_together_in_a_shard(tmp_path):
    def opened(**files):
        shard = _shard(tmp_path / "one.tar", **files)
        return Images(f"wds:{shard}", preprocessing_of(FAMILIES["timm vit"]()))

    both = opened(a_png=png(0), a_json=b'{"label": "cat"}', a_cls=b"1")
    assert both.label(0) == 1
    assert opened(a_png=png(0), a_json=b'{"label": 3.0}').label(0) == 3
    assert not opened(a_png=png(0), a_cls=b"-1").labelled
    with pytest.raises(UsageError, match="no number of a class"):
        opened(a_png=png(0), a_cls=b"3000000000")
    for odd in (b"NaN", b"Infinity", b"-Infinity", b"0.5"):
        with pytest.raises(UsageError, match="no number of a class"):
            opened(a_png=png(0), a_json=b'{"label": ' + odd + b"}")
    with tarfile.open(tmp_path / "links.tar", "w") as archive:
        add(archive, "a.png", png(0))
        for name, kind in (("b.png", tarfile.DIRTYPE), ("c.png", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.png"
            archive.addfile(member)
    assert len(Images(f"wds:{tmp_path / 'links.tar'}", preprocessing_of(FAMILIES["timm vit"]()))) == 1
    with tarfile.open(tmp_path / "dots.tar", "w") as archive:
        for name in ("img 1.0.png", "img 1.1.png"):
            add(archive, name, png(0))
    with pytest.raises(UsageError, match="several images called img 1"):
        Images(f"wds:{tmp_path / 'dots.tar'}", preprocessing_of(FAMILIES["timm vit"]()))
    for prefix in ("tar", "wds", "hfds", "hfids"):
        with pytest.raises(UsageError, match=f"nothing is named behind {prefix}:; write {prefix}:"):
            Images(f"{prefix}:", preprocessing_of(FAMILIES["timm vit"]()))
