import json
import re
from collections import Counter
from contextlib import nullcontext

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import lively, write_images
from families import FAMILIES, SMALL
from timm.models.vision_transformer import VisionTransformer

from tosa_convert import ExportSettings, TosaError, UsageError, convert, export_onnx, load
from tosa_convert.export import onnx as onnx_export
from tosa_convert.export.graph import _Graph, write_graph
from tosa_convert.export.ports import Ports
from tosa_convert.methods.token_ops import keep_count, ratio_steps
from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.models.families.timm_eva import TimmEva
from tosa_convert.models.outputs import agreement
from tosa_convert.models.provenance import preprocessing_of


@pytest.mark.parametrize(
    ("name", "selection"),
    [
        ("timm dinov2 registers", "per_head"),
        pytest.param("hf Dinov2Model", "shared", marks=pytest.mark.long),
        pytest.param("timm vit", "shared", marks=pytest.mark.long),
        pytest.param("hf Dinov2Model", "per_head", marks=pytest.mark.long),
    ],
)
def test_the_file_does_what_torch_does_at_any_batch(name, selection, photos, tmp_path):
    model = convert(lively(FAMILIES[name]()), layers=[2, 4], ratio=0.5, selection=selection)
    check = export_onnx(model, tmp_path, photos)
    assert check.passed
    assert check.images == 8
    assert check.difference < 1e-4
    assert check.selected == {2: 1.0, 4: 1.0}
    assert not re.search(rb"site-packages|tosa_convert/|\.py", (tmp_path / "model.onnx").read_bytes()), (
        "where it was made"
    )
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for batch in (1, 5):
        images = torch.randn(batch, 3, 32, 32)
        with torch.no_grad():
            wanted = run(model, images)
        found = session.run(None, {"images": images.numpy()})
        assert [output.name for output in session.get_outputs()] == list(wanted)
        for ours, theirs in zip(found, wanted.values(), strict=True):
            assert np.allclose(ours, theirs, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("method", ["tome", "mctf"])
def test_a_model_of_depth_exports_where_tokens_are_gone(method, photos, tmp_path):
    check = export_onnx(convert(lively(FAMILIES["hf DPT"]()), method=method, ratio=0.7), tmp_path, photos)
    assert check.passed
    assert check.figures["map_error"] < 1e-5
    assert set(check.selected.values()) == {1.0}


MERGE = {"score": "similarity", "bypass": "merge"}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("timm vit", {"method": "tome", "ratio": 0.7, "layers": [2, 4]}),
        pytest.param(
            "hf Dinov2Model", {**MERGE, "layers": {2: 0.7, 3: 0.4, 4: 0.4}, "segment": [1, 2]}, marks=pytest.mark.long
        ),
        pytest.param("hf Dinov2Model", {"method": "evit", "ratio": 0.7}, marks=pytest.mark.long),
        pytest.param("timm vit", {"method": "frequency", "ratio": 0.7}, marks=pytest.mark.long),
        ("timm vit", {"method": "mctf", "ratio": 0.7, "layers": [2, 4]}),
        pytest.param("timm eva02", {"method": "tome", "ratio": 0.7}, marks=pytest.mark.long),
        pytest.param("timm eva02", {"method": "mctf", "ratio": 0.7}, marks=pytest.mark.long),
        pytest.param("hf Dinov2Backbone", {"method": "tome", "ratio": 0.7}, marks=pytest.mark.long),
        pytest.param("timm vit", {"method": "idle", "ratio": 0.7}, marks=pytest.mark.long),
        pytest.param("timm vit", {"score": "norm", "bypass": "borrow", "layers": {3: 0.5}}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_bypasses_export_with_any_batch(name, options, photos, tmp_path):
    model = convert(lively(FAMILIES[name]()), **options)
    check = export_onnx(model, tmp_path, photos)
    assert check.difference < 1e-4
    assert set(check.selected.values()) == {1.0}
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for batch in (1, 5):
        images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            wanted = next(iter(run(model, images).values()))
        assert np.allclose(session.run(None, {"images": images.numpy()})[0], wanted, atol=1e-4)


OTHERS = ("fuse", "identity", "borrow", "persist", "local_mean")


@pytest.mark.parametrize("bypass", ["merge", *(pytest.param(each, marks=pytest.mark.long) for each in OTHERS)])
def test_a_ratio_at_which_nobody_is_skipped_exports(bypass, photos, tmp_path):
    """0.99 of 16 patches are 16."""
    score = {"fuse": "class_attention", "local_mean": "received"}.get(bypass, "similarity")
    vit = VisionTransformer(**{**SMALL, "depth": 3})
    model = convert(lively(vit), score=score, bypass=bypass, layers=[2], ratio=0.99)
    assert export_onnx(model, tmp_path, photos).difference < 1e-4


def test_ties_are_broken_alike(photos, tmp_path):
    """With constant scores every token ties: torch and ONNX Runtime must still choose the same ones."""
    model = convert(lively(FAMILIES["timm vit"]()), layers=[2], ratio=0.5)
    selector = model.blocks[1].selector
    selector.score = lambda view: (view.reading * 0).sum(2).transpose(0, 1)
    assert export_onnx(model, tmp_path, photos).selected == {2: 1.0}


@pytest.mark.long
def test_random_selection_exports_too(photos, tmp_path):
    model = convert(lively(FAMILIES["timm vit"]()), layers=[2, 4], ratio=0.3, score="random")
    assert export_onnx(model, tmp_path, photos).selected == {2: 1.0, 4: 1.0}


@pytest.mark.usefixtures("shared_exports")
def test_labels_give_three_top1_side_by_side(labelled, tmp_path):
    model = convert(load("quickstart"), layers=[2], ratio=0.5)
    check = export_onnx(model, tmp_path, labelled, original=load("quickstart"))
    assert set(check.metrics["top1"]) == {"original", "torch", "onnx"}
    facts = json.loads((tmp_path / "preprocessing.json").read_text())
    assert facts["status"] == "passed"
    assert facts["input"]["shape"] == ["batch", 1, 28, 28]
    assert facts["mean"] == [0.286]
    assert len(facts["classes"]) == 10


def test_a_wrong_file_fails_and_is_marked(photos, tmp_path, monkeypatch):
    """The check runs the file itself: a graph with other weights must not pass."""
    write = onnx_export.write_graph

    def wrong(model, path, *options):
        write(model, path, *options)
        proto = onnx.load(path)
        for tensor in proto.graph.initializer:
            if tensor.name.endswith("head.weight"):
                values = onnx.numpy_helper.to_array(tensor)
                tensor.CopyFrom(onnx.numpy_helper.from_array(-values, tensor.name))
        onnx.save_model(proto, path)

    monkeypatch.setattr(onnx_export, "write_graph", wrong)
    model = convert(lively(FAMILIES["timm vit"]()), layers=[2], ratio=0.5)
    (tmp_path / "model.onnx").write_bytes(b"of an earlier export")
    with pytest.raises(TosaError, match="below the threshold of 99%"):
        export_onnx(model, tmp_path, photos)
    assert not (tmp_path / "model.onnx").exists()
    assert (tmp_path / "model.failed.onnx").exists()
    assert json.loads((tmp_path / "preprocessing.json").read_text())["status"] == "failed"


@pytest.mark.usefixtures("shared_exports")
def test_without_a_readable_image_nothing_is_called_checked(tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"not an image")
    with pytest.raises(TosaError, match="unchecked"):
        export_onnx(convert(load("quickstart"), layers=[2], ratio=0.5), tmp_path / "out", folder)
    assert not (tmp_path / "out/model.onnx").exists()


@pytest.mark.usefixtures("shared_exports")
def test_the_threshold_is_the_users(photos, tmp_path):
    model = convert(load("quickstart"), layers=[2], ratio=0.5)
    assert export_onnx(model, tmp_path, photos, ExportSettings(threshold=1.0)).threshold == 1.0


def test_an_export_leaves_the_model_usable(photos, tmp_path):
    model = convert(lively(VisionTransformer(**{**SMALL, "depth": 3})), layers=[2], ratio=0.5)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = model(images)
        export_onnx(model, tmp_path, photos)
        assert torch.equal(model(images), wanted)


@pytest.mark.usefixtures("shared_exports")
def test_a_refused_export_leaves_the_earlier_one(tmp_path):
    write_images(tmp_path / "three", 3, ["a", "b", "c"])
    model = convert(load("quickstart"), layers=[2], ratio=0.5)
    export_onnx(model, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UsageError, match="3 classes"):
        export_onnx(model, tmp_path / "out", tmp_path / "three")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert export_onnx(model, tmp_path / "out", tmp_path / "three", ExportSettings(labels=False)).passed


@pytest.mark.parametrize("kind", ["logits", "tokens", "predicted_depth"])
def test_agreement_sees_what_is_wrong(kind):
    shape = {"logits": (4, 6), "tokens": (4, 5, 6), "predicted_depth": (4, 8, 8)}[kind]
    wanted = torch.rand(shape) + 1
    assert agreement(kind, wanted + 1e-6, wanted).tolist() == [1] * 4
    assert agreement(kind, wanted.flip(-1), wanted).mean() < 0.5
    wrong = wanted.clone()
    wrong[1] = float("nan")
    assert agreement(kind, wrong, wrong).tolist() == [1, 0, 1, 1]


def test_a_head_with_one_output_is_compared_by_value():
    wanted = torch.tensor([[0.1], [0.9], [0.4]])
    assert agreement("logits", wanted, wanted).tolist() == [1, 1, 1]
    assert agreement("logits", wanted.flip(0), wanted).tolist() == [0, 1, 0]


HEAVY = {"MatMul", "Gemm", "Conv", "Softmax", "LayerNormalization", "Gelu", "Erf"}


def _operators(model, folder) -> Counter:
    folder.mkdir()
    write_graph(model, folder / "model.onnx", 20)
    return Counter(node.op_type for node in onnx.load(folder / "model.onnx").graph.node)


def test_what_a_selective_layer_adds_to_the_graph(tmp_path):
    """One sort, one flat gather of the tokens, one flat scatter; QKᵀ of a few rows head by head, two convolutions.
    The element-wise gather and scatter are eight times slower in ONNX Runtime."""
    layers, small = [2, 4], {**SMALL, "depth": 4}
    before = _operators(VisionTransformer(**small), tmp_path / "original")
    converted = convert(VisionTransformer(**small), layers=layers, ratio=0.5, rows=8)
    after = _operators(converted, tmp_path / "converted")
    added = after - before
    for operator, count in {"TopK": 1, "ScatterND": 1, "Softmax": 1, "MatMul": 3, "Conv": 2}.items():
        assert added[operator] == count * len(layers), operator
    assert not {"GatherElements", "ScatterElements", "NonZero", "Where", "Loop", "If"} & set(added)
    assert not {operator: count for operator, count in (before - after).items() if operator in HEAVY}


@pytest.mark.long
def test_one_graph_serves_every_image_size():
    """K and the query rows follow from the size the graph runs at, not from the one it was traced at."""
    vit = VisionTransformer(img_size=64, patch_size=8, embed_dim=48, depth=4, num_heads=3, dynamic_img_size=True)
    model = convert(lively(vit), layers=[2, 4], ratio=0.5, rows=8)
    graph = _Graph(model, Ports(preprocessing_of(model))).eval()
    batch, height, width = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "height", "width"))
    with torch.no_grad():
        program = torch.onnx.export(
            graph,
            (torch.randn(2, 3, 64, 80),),
            dynamic_shapes={"images": {0: batch, 2: 8 * height, 3: 8 * width}},
            dynamo=True,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for shape in ((2, 3, 64, 80), (1, 3, 64, 64), (3, 3, 32, 96), (2, 3, 160, 128)):
        images = torch.randn(shape)
        with torch.no_grad():
            logits, *chosen = graph(images).values()
        found = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        assert np.allclose(found[0], logits, atol=1e-4)
        for ours, theirs in zip(found[1:], chosen, strict=True):
            assert theirs.shape[1] == 1 + keep_count(shape[2] * shape[3] // 64, ratio_steps(0.5))
            assert np.array_equal(ours, theirs)


def test_a_file_for_any_size_is_checked_at_several(photos, tmp_path):
    """Of a model, too, that was not made with timm's dynamic_img_size, which it does not keep."""
    vit = lively(VisionTransformer(**{**SMALL, "depth": 3}))
    converted = convert(vit, score="similarity", bypass="merge", layers={3: 0.5})
    check = export_onnx(converted, tmp_path, photos, ExportSettings(any_size=True))
    assert check.sizes == [(32, 32), (48, 40), (24, 32)]
    assert check.difference < 1e-4
    assert json.loads((tmp_path / "preprocessing.json").read_text())["input"]["shape"][2:] == ["height", "width"]
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    images = torch.randn(2, 3, 56, 24)
    with torch.no_grad(), adapter_of(converted).any_size():
        wanted = converted(images)
    assert np.allclose(session.run(None, {"images": images.numpy()})[0], wanted, atol=1e-4)
    assert not converted.dynamic_img_size
    assert converted(torch.randn(1, 3, 32, 32)).shape == (1, 5)


def test_a_model_of_one_size_gives_no_file_for_any(photos, tmp_path):
    with pytest.raises(UsageError, match="takes images of 32×32 only"):
        export_onnx(lively(FAMILIES["timm cait"]()), tmp_path, photos, ExportSettings(any_size=True))
    assert not (tmp_path / "model.onnx").exists()


ONE_SIZE = ("timm beit", "timm beit shared", "timm relpos", "timm relpos shared", "timm relpos post-norm", "timm cait",
            "hf Aimv2VisionModel", "hf SAM", "hf ViTDet", "timm sam", "hf Llama4VisionModel", "hf VJEPA2")  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_exports_for_any_batch_and_for_any_size_that_it_takes(name, tmp_path):
    """Agrees with torch at batches and sizes that it was not exported with."""
    converted = convert(lively(FAMILIES[name]()), score="similarity", bypass="merge", layers={3: 0.5})
    adapter, size = adapter_of(converted), preprocessing_of(converted).size  # NaFlex has none of its own
    _agrees(converted, tmp_path, False, [(1, 3, *size), (5, 3, *size)])
    if name in ONE_SIZE:
        with pytest.raises(UsageError, match="only, so its file cannot take any size"):
            export_onnx(converted, tmp_path, settings=ExportSettings(any_size=True))
        return
    others = [(64, 64), (48, 48)] if adapter.square else [(64, 48), (48, 80)]
    with adapter.any_size():
        _agrees(converted, tmp_path, True, [(5, 3, 32, 32), *((2, 3, *other) for other in others)])


def _agrees(converted, folder, any_size: bool, shapes: list[tuple[int, ...]]) -> None:
    write_graph(converted, folder / "model.onnx", 20, any_size)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    for shape in shapes:
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            wanted = run(converted, images).values()
        for ours, theirs in zip(session.run(None, {"images": images.numpy()}), wanted, strict=True):
            assert np.allclose(ours, theirs, atol=1e-4 * max(1.0, theirs.abs().max().item())), shape


@pytest.mark.long
def test_positions_that_are_fixed_in_the_file_are_found_out(photos, tmp_path, monkeypatch):
    """The exporter notes the positions of the size that it sees, without a word; the check must tell."""
    monkeypatch.setattr(TimmEva, "exporting", lambda self: nullcontext())
    model = convert(lively(FAMILIES["timm dinov3"]()), layers=[2], ratio=0.5)
    with pytest.raises(TosaError, match="--any-size"):
        export_onnx(model, tmp_path, photos, ExportSettings(any_size=True))
    assert not (tmp_path / "model.onnx").exists()
