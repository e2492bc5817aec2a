"""Backbones under heads: the heads' parts against references, and the whole way of a dense model."""

import copy
import io
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import lively
from dense_models import cli, depth_model, write_pairs
from families import FAMILIES, HF_SMALL
from PIL import Image
from safetensors.torch import save_file

from tosa_convert import (
    ExportSettings,
    FinetuneSettings,
    UsageError,
    convert,
    evaluate,
    finetune,
    flops,
    load,
    original,
    save,
)
from tosa_convert.config.head import HeadConfig
from tosa_convert.data.images import built_in_scenes
from tosa_convert.export.onnx import export_onnx
from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.models.dense import DenseModel, heads, with_head
from tosa_convert.models.heads import light, newcrfs
from tosa_convert.models.outputs import predict
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.planning import rivals
from tosa_convert.planning.comparison import compare, labelled_sample
from tosa_convert.planning.plan import find_plan
from tosa_convert.reporting.token_maps import look_at_files
from tosa_convert.runs.loading import original_of
from tosa_convert.tasks.task import Metric, Task, task_of

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def small_crfs(monkeypatch):
    """NeWCRFs of a width that tests can afford."""
    monkeypatch.setattr(newcrfs, "STAGES", ((64, 4), (32, 4), (32, 2), (16, 2)))
    monkeypatch.setattr(newcrfs, "POOLED", 32)


@pytest.fixture
def small_light(monkeypatch):
    """A head that does not outweigh the backbones of these tests."""
    monkeypatch.setattr(light, "WIDTHS", (8, 8, 4))


@pytest.mark.parametrize("head", heads())
@pytest.mark.parametrize("size", [(32, 32), (40, 56), (8, 24)])
def test_a_map_has_the_size_of_its_image(head, size, small_crfs):
    model = depth_model(head, "timm dinov2 registers")
    with torch.no_grad():
        found = model(torch.randn(2, 3, *size))
    assert found.shape == (2, 1, *size)
    assert found.isfinite().all()
    assert (found >= 0).all()
    assert (found <= 10).all()


@pytest.mark.parametrize("head", heads())
def test_a_run_of_a_dense_model_opens_again(head, tmp_path, small_crfs):
    model = convert(depth_model(head, "hf Dinov2Model"), score="similarity", bypass="merge", layers={3: 0.5})
    save(model, tmp_path / "run")
    opened = load(tmp_path / "run")
    assert opened.config == model.config
    with torch.no_grad():
        assert torch.equal(opened(PIXELS), model(PIXELS))
        assert torch.equal(original(opened)(PIXELS), depth_model(head, "hf Dinov2Model")(PIXELS))


@pytest.mark.long
@pytest.mark.parametrize("head", ["dpt", "newcrfs"])
def test_a_dense_model_exports_at_any_batch(head, tmp_path, small_crfs):
    model = convert(depth_model(head), score="similarity", bypass="merge", layers={2: 0.6, 4: 0.5})
    write_pairs(tmp_path / "data", 3)
    check = export_onnx(model, tmp_path / "out", f"depth:{tmp_path / 'data'}")
    assert check.passed
    assert check.metrics["abs_rel"]["onnx"] == pytest.approx(check.metrics["abs_rel"]["torch"], rel=1e-4)


@pytest.mark.long
def test_light_heads_export_at_any_size(tmp_path):
    model = convert(depth_model("light"), score="similarity", bypass="merge", layers={2: 0.6})
    assert export_onnx(model, tmp_path, settings=ExportSettings(any_size=True, images=2)).passed


def test_the_whole_module_can_be_saved_and_copied():
    model = convert(depth_model(), score="similarity", bypass="merge", layers={2: 0.6})
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    again = torch.load(stream, weights_only=False)
    with torch.no_grad():
        wanted = model(PIXELS)
        assert torch.equal(again(PIXELS), wanted)
        assert torch.equal(copy.deepcopy(model)(PIXELS), wanted)


def test_two_threads_get_their_own_maps():
    model = depth_model()
    images = [torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    with torch.no_grad():
        wanted = [model(image) for image in images]

        def go(place: int) -> bool:
            with torch.no_grad():
                return all(torch.equal(model(images[place]), wanted[place]) for _ in range(20))

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(go, range(4)))


def test_heads_are_new_but_the_same_each_time():
    one, other = (depth_model("light").head.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_head_of_a_classifier_is_left_away():
    found = with_head(FAMILIES["hf ViT classifier"](), HeadConfig(task="segmentation"))
    assert type(found.encoder).__name__ == "ViTModel"


def test_weights_of_a_head_are_taken_and_others_refused(tmp_path):
    model, state = depth_model("light"), {}
    for name, value in model.head.state_dict().items():
        state[f"head.{name}"] = value + 1 if value.is_floating_point() else value
    config = model.config
    filled = with_head(FAMILIES["timm dinov2 registers"](), config, state)
    assert torch.equal(filled.head.stack[0].weight, state["head.stack.0.weight"])
    wider = FAMILIES["hf Dinov2Model"]()
    narrow = type(wider)(type(wider.config)(**{**HF_SMALL, "hidden_size": 24}, mlp_ratio=2))
    with pytest.raises(UsageError, match=r"f.safetensors does not fit this head: norm.weight is \(24,\)"):
        with_head(narrow, config, state, "f.safetensors")
    with pytest.raises(UsageError, match="the file has none"):
        with_head(FAMILIES["timm dinov2 registers"](), HeadConfig(task="depth", head="dpt", max_depth=5.0), state)


def test_a_plan_keeps_the_map_and_says_what_it_lost(small_light, monkeypatch):
    monkeypatch.setattr(rivals, "lasting", lambda _: ["tome"])  # the others would only take time
    model = depth_model()
    pixels = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    plan = find_plan(model, pixels, 0.9)
    assert plan.keep == "map"
    converted = convert(copy.deepcopy(model), plan.config)
    with torch.no_grad():
        theirs, ours = model(pixels), converted(pixels)
    wanted = ((ours - theirs).abs() / theirs).mean()
    assert task_of(model).difference(ours, theirs)["depth_error"].mean() == pytest.approx(wanted.item(), rel=1e-4)


def test_compare_reports_the_difference_of_the_maps(tmp_path, small_light):
    write_pairs(tmp_path, 4)
    found = compare(
        depth_model(), f"depth:{tmp_path}", budgets=[0.9], methods=["similarity/merge"], images=4, runtime=None
    )
    assert found["labelled"]
    for row in found["rows"]:
        assert {"patch", "depth_error", "abs_rel", "delta1"} <= set(row)
        assert row["depth_error"] > 0
    assert found["original"]["depth_error"] == 0


def test_a_budget_that_a_large_head_puts_out_of_reach_is_said_to_be_so():
    with pytest.raises(UsageError, match=r"\d+% of the multiply–adds are outside of the layers"):
        find_plan(depth_model(), torch.cat([PIXELS, PIXELS]), 0.5)


def test_a_task_of_ones_own_is_one_class(small_light):
    class Brightness(Task):
        metrics = {"off": Metric("off", higher_is_better=False)}  # noqa: RUF012
        differences = {"apart": Metric("apart", higher_is_better=False)}  # noqa: RUF012

        @classmethod
        def suits(cls, model):
            return isinstance(model, DenseModel) and model.config.task == "brightness"

        def difference(self, output, original):
            return {"apart": (output - original).abs().flatten(1).mean(1)}

    model = with_head(lively(FAMILIES["timm dinov2 registers"]()), HeadConfig(task="brightness"))
    converted = convert(copy.deepcopy(model), score="similarity", bypass="merge", layers={2: 0.4})
    assert next(iter(run(model, PIXELS))) == "brightness"
    found = evaluate({"original": model, "converted": converted}, reference="original")
    assert found["models"]["converted"]["apart"] > 0
    assert find_plan(model, torch.cat([PIXELS, PIXELS]), 0.9).keep == "map"


def test_options_without_a_task_are_refused(tmp_path):
    for options in ({"head": "light"}, {"max_depth": 3.0}, {"head_checkpoint": "x"}):
        with pytest.raises(UsageError, match="add --task depth"):
            load("quickstart", **options)
    with pytest.raises(UsageError, match="no head 'big'"):
        load("quickstart", task="depth", head="big")
    with pytest.raises(UsageError, match="no task 'sound'; give one of depth, segmentation"):
        load("quickstart", task="sound")
    for task in ("classification", "relative_depth"):
        with pytest.raises(UsageError, match="takes no new head; give one of depth"):
            load("quickstart", task=task)
    with pytest.raises(UsageError, match="no classes"):
        load("quickstart", task="depth", num_classes=3)
    with pytest.raises(UsageError, match="no depth"):
        load("quickstart", task="segmentation", max_depth=3.0)


@pytest.mark.long
def test_the_command_line_takes_depth_the_whole_way(tmp_path, capsys):
    write_pairs(tmp_path / "data", 9)
    data, run_folder = f"depth:{tmp_path / 'data'}", tmp_path / "whole"
    training = ["--data", data, "--steps", 2, "--batch-size", 2]
    cli("finetune", "quickstart", "--task", "depth", "--ratio", 1, *training, "--out", run_folder)
    assert load(run_folder).config.max_depth == 10.0
    assert not hasattr(load(run_folder), "tosa_config")  # it can be planned and converted
    cli("finetune", run_folder, "--method", "tome", "--ratio", 0.95, *training, "--teacher", "--out", tmp_path / "tome")
    capsys.readouterr()
    cli("eval", tmp_path / "tome", "--data", data, "--flip", "--predictions", tmp_path / "maps", "--json")
    found = capsys.readouterr().out
    assert {'"abs_rel"', '"rmse"', '"delta1"', '"depth_error"'} <= set(found.replace(":", " ").split())
    assert np.load(tmp_path / "maps" / "3.npy").shape == (40, 48)
    cli("eval", tmp_path / "tome", "--data", data, "--predictions", tmp_path / "pngs", "--format", "png")
    with Image.open(tmp_path / "pngs" / "3.png") as opened:
        metres = np.asarray(opened) / 256
    assert 0 < metres.max() <= 10
    cli("export", tmp_path / "tome", "--data", data)
    cli("show", tmp_path / "tome", "--out", tmp_path / "show.png")


def test_the_mean_of_a_map_and_its_mirror_is_symmetric(tmp_path):
    write_pairs(tmp_path, 2)
    model = depth_model()
    plain, flipped = (evaluate(model, f"depth:{tmp_path}", flip=flip)["models"]["model"] for flip in (False, True))
    assert plain != flipped
    mean, mirrored = (predict(model, images, flip=True)[1] for images in (PIXELS, PIXELS.flip(-1)))
    assert torch.allclose(mean, mirrored.flip(-1), atol=1e-5)
    assert not torch.allclose(mean, mirrored, atol=1e-3)
    with pytest.raises(UsageError, match="--flip is for maps"):
        evaluate(load("quickstart"), flip=True)


def test_maps_of_which_nothing_is_known_teach_and_measure_nothing(tmp_path):
    nothing, rest = np.full((32, 32), np.nan, np.float32), np.full((32, 32), 2.0, np.float32)
    image = np.zeros((32, 32, 3), np.uint8)
    write_pairs(tmp_path / "none", [(image, nothing)] * 2)
    write_pairs(tmp_path / "some", [(image, nothing), (image, rest)])
    model = convert(depth_model(), ratio=1.0)
    settings = FinetuneSettings(steps=2, batch_size=2, augment="none")
    with pytest.raises(UsageError, match="in none of the maps"):
        finetune(model, f"depth:{tmp_path / 'none'}", settings, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    found = finetune(model, f"depth:{tmp_path / 'some'}", settings, device="cpu")
    assert found["broken"] == ["0.png (depth: nothing is known)"]
    check = export_onnx(depth_model(), tmp_path / "onnx", f"depth:{tmp_path / 'none'}")
    assert check.passed
    assert not check.metrics
    assert labelled_sample(depth_model(), f"depth:{tmp_path / 'none'}", 2)[2] is None


@pytest.mark.parametrize(("labels", "moves"), [(0.0, False), (1.0, True)])
def test_statistics_of_a_trained_head_stay_where_the_original_alone_teaches(tmp_path, labels, moves):
    write_pairs(tmp_path, 4)
    model = convert(depth_model(), ratio=0.5)
    before = [each.running_mean.clone() for each in model.modules() if isinstance(each, torch.nn.BatchNorm2d)]
    settings = FinetuneSettings(steps=1, batch_size=2, labels=labels)
    finetune(model, f"depth:{tmp_path}", settings, device="cpu")
    after = [each.running_mean for each in model.modules() if isinstance(each, torch.nn.BatchNorm2d)]
    assert before
    assert all(torch.equal(*pair) != moves for pair in zip(before, after, strict=True))


def test_a_reach_that_is_none_is_refused():
    for metres in (-1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match=r"--max-depth .* is out of range"):
            load("quickstart", task="depth", max_depth=metres)


def test_images_are_not_changed_without_their_maps(tmp_path):
    write_pairs(tmp_path, 2)
    with pytest.raises(UsageError, match="aa and reprob change images without their maps"):
        finetune(convert(depth_model(), ratio=1.0), f"depth:{tmp_path}", FinetuneSettings(steps=1, reprob=0.5))


def test_a_dense_model_that_is_not_converted_is_shown_with_its_map():
    looks = look_at_files(depth_model(), built_in_scenes()[:2])
    assert looks.views == [[], []]
    assert [[panel.title for panel in panels] for panels in looks.maps] == [["map"], ["map"]]


def test_the_original_of_a_run_has_the_head_it_was_made_with(tmp_path):
    model = load("quickstart", task="depth")
    state = {name: value + 1 if value.is_floating_point() else value for name, value in model.head.state_dict().items()}
    save_file(state, tmp_path / "head.safetensors")
    trained = load("quickstart", task="depth", head_checkpoint=tmp_path / "head.safetensors")
    images = torch.randn(1, preprocessing_of(trained).channels, 28, 28)
    with torch.no_grad():
        wanted = trained(images)
        for name, made, known in (("filled", trained, True), ("new", model, False)):
            save(convert(made, score="similarity", bypass="merge", layers={3: 0.8}), tmp_path / name)
            before = original_of(load(tmp_path / name))
            assert (before is not None) is known
        assert torch.equal(original_of(load(tmp_path / "filled"))(images), wanted)


def test_half_precision_keeps_the_steps_of_metres_fine():
    model = depth_model()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(PIXELS)
    assert found.dtype == torch.float32


def test_a_head_on_a_run_is_refused(tmp_path):
    save(load("quickstart"), tmp_path / "classifier")
    with pytest.raises(UsageError, match="the head of a run is fixed"):
        load(tmp_path / "classifier", task="depth")
    save(load("quickstart", task="depth"), tmp_path / "depth")
    assert load(tmp_path / "depth", task="depth").config.max_depth == 10.0
    with pytest.raises(UsageError, match="up to 10 m"):
        load(tmp_path / "depth", task="depth", max_depth=80.0)


def test_the_adapter_is_that_of_the_backbone():
    model = depth_model("light", "hf Dinov2Model")
    assert adapter_of(model).patches((32, 32)) == 16
    assert flops(model).original > flops(model.encoder).original
