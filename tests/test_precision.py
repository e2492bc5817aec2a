"""Files with fewer bits: made of the float32 one, checked alike, and as near to it as was asked for."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import lively
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from token_models import FEW, plain

from tosa_convert import ExportSettings, TosaError, UsageError, convert, export_onnx, load
from tosa_convert.base import environment
from tosa_convert.base.errors import TosaWarning
from tosa_convert.cli.main import main
from tosa_convert.data.sampling import sample
from tosa_convert.export import files, gate, quantization
from tosa_convert.export.ports import Ports
from tosa_convert.models.adapter import run
from tosa_convert.models.preprocessing import Preprocessing
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.runs.lock import alone


def outputs(file, images: torch.Tensor) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(str(file)).run(None, {"images": images.numpy()})


@pytest.mark.usefixtures("shared_exports")
def test_int8_is_smaller_near_and_says_what_it_comes_from(backbone, photos, tmp_path):
    original = plain()
    check = export_onnx(backbone, tmp_path / "out", photos, ExportSettings(precision="int8", **FEW), original=original)
    assert check.passed
    assert check.precision == "int8"
    assert [link["name"] for link in check.chain] == ["original", "torch", "float32", "int8"]
    links = {link["name"]: link for link in check.chain}
    assert links["int8"]["bytes"] < links["float32"]["bytes"]
    assert links["original"]["patch"] == pytest.approx(1)
    assert links["float32"]["patch"] == pytest.approx(links["torch"]["patch"], abs=1e-4)
    assert abs(links["int8"]["patch"] - links["torch"]["patch"]) < 0.1
    assert set(check.selected) == {2, 3}
    file = tmp_path / "out" / "model.onnx"
    kinds = {node.op_type for node in onnx.load(file).graph.node}
    assert "DynamicQuantizeMatMul" in kinds or "MatMulInteger" in kinds
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.onnx", "preprocessing.json"]
    assert json.loads((tmp_path / "out/preprocessing.json").read_text())["precision"] == "int8"
    for batch in (1, 5):
        images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
        wanted = next(iter(run(backbone, images).values())).detach()
        found = torch.from_numpy(outputs(file, images)[0])
        assert torch.cosine_similarity(found, wanted, dim=-1).mean() > 0.9


@pytest.mark.usefixtures("shared_exports")
def test_what_a_killed_export_left_goes(backbone, photos, tmp_path):
    left = tmp_path / "out" / ".export-killed"
    left.mkdir(parents=True)
    (left / "float32.onnx").write_bytes(b"half")
    export_onnx(backbone, tmp_path / "out", photos, ExportSettings(images=8))
    assert not left.exists()
    with alone(tmp_path / "out"), ThreadPoolExecutor(1) as other:
        second = other.submit(export_onnx, backbone, tmp_path / "out", photos, ExportSettings(images=8))
        with pytest.raises(UsageError, match="another tosa-convert is writing"):
            second.result()


@pytest.mark.usefixtures("shared_exports")
def test_a_file_in_float16_takes_and_gives_float32(backbone, photos, tmp_path):
    settings = ExportSettings(precision="float16", images=8, min_cosine=0.999)
    check = export_onnx(backbone, tmp_path / "out", photos, settings)
    file = tmp_path / "out" / "model.onnx"
    session = onnxruntime.InferenceSession(str(file))
    assert {port.type for port in (*session.get_inputs(), *session.get_outputs())} == {"tensor(float)"}
    links = {link["name"]: link for link in check.chain}
    assert links["float16"]["bytes"] < 0.7 * links["float32"]["bytes"]
    graph = onnx.load(file).graph
    half = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16}
    assert half
    norms = [node for node in graph.node if node.op_type == "LayerNormalization"]
    assert norms
    assert not any(set(node.input) & half for node in norms)


@pytest.mark.usefixtures("shared_exports")
@pytest.mark.parametrize("calibration", ["minmax", "percentile", pytest.param("entropy", marks=pytest.mark.long)])
def test_ranges_can_be_found_beforehand(calibration, backbone, photos, tmp_path):
    settings = ExportSettings(precision="int8", calibration=calibration, calibration_images=8, images=8, min_cosine=0.5)
    assert export_onnx(backbone, tmp_path / "out", photos, settings).passed
    kinds = {node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds


@pytest.mark.long
@pytest.mark.usefixtures("shared_exports")
def test_each_calibration_finds_ranges_of_its_own(backbone, photos, tmp_path):
    export_onnx(backbone, tmp_path, photos, ExportSettings(images=8))
    pixels = np.stack([image.numpy() for image in sample(photos, preprocessing_of(backbone), 8)[0]])
    found = {}
    for calibration in quantization.METHODS:
        (tmp_path / calibration).mkdir()
        int8 = quantization.Int8(tmp_path / "model.onnx", tmp_path / calibration, calibration, pixels, gate.Progress())
        found[calibration] = json.loads(int8.ranges.read_text())["data"]
    assert found["minmax"].keys() == found["entropy"].keys() == found["percentile"].keys()
    assert len({json.dumps(ranges, sort_keys=True) for ranges in found.values()}) == 3


@pytest.mark.long
def test_labels_give_top1_along_the_chain(labelled, tmp_path):
    model = convert(load("quickstart"), layers=[2], ratio=0.5)
    settings = ExportSettings(precision="int8", min_agreement=0.5)
    check = export_onnx(model, tmp_path / "out", labelled, settings, original=load("quickstart"))
    assert all(0 <= link["top1"] <= 1 for link in check.chain)
    assert len(check.chain) == 4
    assert set(check.metrics["top1"]) == {"original", "torch", "onnx"}
    assert check.metrics["top1"]["onnx"] == check.chain[-1]["top1"]


@pytest.mark.parametrize("precision", ["float32", pytest.param("int8", marks=pytest.mark.long)])
def test_a_file_can_take_pixels_and_give_probabilities(precision, labelled, tmp_path):
    model = convert(load("quickstart"), layers=[2], ratio=0.5)
    settings = ExportSettings(raw_input=True, precision=precision, min_agreement=0.5)
    check = export_onnx(model, tmp_path / "out", labelled, settings)
    assert check.passed
    if precision == "float32":
        assert check.difference < 1e-5
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), dtype=np.uint8)
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    (port,) = session.get_inputs()
    assert (port.name, port.type, port.shape[1:]) == ("images", "tensor(uint8)", [28, 28, 1])
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, {"images": pixels}), strict=True))["probabilities"]
    assert np.allclose(found.sum(-1), 1, atol=1e-5)
    facts = json.loads((tmp_path / "out/preprocessing.json").read_text())
    assert facts["input"]["shape"] == ["batch", 28, 28, 1]
    assert facts["outputs"][0] == {"name": "probabilities", "shape": ["batch", 10]}
    scale = preprocessing_of(model)
    normed = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - scale.mean[0]) / scale.std[0]
    with torch.no_grad():
        wanted = run(model, normed)["logits"].softmax(-1).numpy()
    assert np.allclose(found, wanted, atol=1e-5 if precision == "float32" else 0.2)


@given(st.integers(1, 3), st.sampled_from([1, 3]))
def test_pixels_survive_the_way_in_and_out(batch, channels):
    preprocessing = Preprocessing(size=(4, 6), channels=channels, mean=(0.3,) * channels, std=(0.2,) * channels)
    pixels = torch.randint(0, 256, (batch, 4, 6, channels), dtype=torch.uint8)
    raw, plain = Ports(preprocessing, raw=True), Ports(preprocessing)
    assert torch.equal(raw.encoded(raw.entering(pixels)), pixels)
    images = torch.randn(batch, channels, 4, 6)
    assert plain.entering(plain.encoded(images)) is images


@pytest.mark.usefixtures("shared_exports")
def test_images_that_cannot_be_read_are_left_out(backbone, photos, tmp_path):
    (photos / "000.png").write_bytes(b"not an image")
    check = export_onnx(backbone, tmp_path / "out", photos, ExportSettings(precision="int8", **FEW))
    assert check.broken == ["000.png"]
    assert check.chain[-1]["ms"] > 0


def one_colour(folder, count: int):
    folder.mkdir()
    for index in range(count):
        Image.new("RGB", (32, 32), (index, 0, 0)).save(folder / f"{index}.png")
    return folder


@pytest.mark.usefixtures("shared_exports")
@pytest.mark.parametrize(("count", "message"), [(2, "too few images to calibrate on"), (12, "each of one colour")])
def test_calibration_needs_images_that_differ(count, message, backbone, tmp_path):
    folder = one_colour(tmp_path / "plain", count)
    with pytest.raises(UsageError, match=message):
        export_onnx(
            backbone, tmp_path / "out", folder, ExportSettings(precision="int8", calibration="minmax", images=8)
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_weights_too_large_for_one_file_lie_beside_it(backbone, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LIMIT", 2**16)
    images, folder = torch.randn(2, 3, 32, 32), tmp_path / "out"
    wanted = next(iter(run(backbone, images).values())).detach().numpy()
    before = None
    for settings in (ExportSettings(images=8), ExportSettings(precision="int8", **FEW)):
        export_onnx(backbone, folder, photos, settings)
        weights, *others = sorted(path.name for path in folder.iterdir())
        assert weights.startswith("model-")
        assert weights != before
        assert others == ["model.onnx", "preprocessing.json"]
        found = outputs(folder / "model.onnx", images)[0]
        assert np.allclose(found, wanted, atol=1e-4 if before is None else 1)
        before = weights


def test_a_processor_without_the_instructions_leaves_weights_a_bit_of_room(monkeypatch):
    monkeypatch.setattr(quantization.platform, "machine", lambda: "x86_64")
    for flags, saturates in ((["avx2"], True), (["avx2", "avx_vnni"], False)):
        monkeypatch.setattr(environment, "instructions", lambda flags=flags: flags)
        assert quantization._saturates() is saturates


@pytest.mark.long
@pytest.mark.usefixtures("shared_exports")
def test_a_processor_without_the_instructions_is_warned_of(backbone, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "instructions", lambda: frozenset({"avx2"}))
    with pytest.warns(TosaWarning, match="INT8 may be no faster than float32"):
        export_onnx(backbone, tmp_path / "out", photos, ExportSettings(precision="int8", **FEW))


def test_settings_that_go_ill_together_are_refused(capsys):
    with pytest.raises(ValueError, match="calibration is for precision int8"):
        ExportSettings(calibration="entropy")
    with pytest.raises(SystemExit) as stop:
        main(["export", "quickstart", "--precision", "float16", "--calibration", "minmax"])
    assert stop.value.code == 2
    assert "calibration is for precision int8, not float16" in capsys.readouterr().err


@pytest.mark.usefixtures("shared_exports")
def test_the_command_shows_the_chain(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["export", "quickstart", "--precision", "int8", "--out", str(tmp_path / "out"), "--images", "8"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "this model in torch" in shown
    assert "near enough to float32: agreement" in shown
    assert all(len(line) <= 80 for line in shown.splitlines() if "/" not in line)


@pytest.mark.long
def test_maps_are_held_to_the_error_of_their_task(photos, tmp_path):
    from dense_models import depth_model

    check = export_onnx(depth_model(), tmp_path / "out", photos, ExportSettings(precision="int8", max_error=0.5))
    assert check.bounds == {"error": 0.5}
    with pytest.raises(TosaError, match="error"):
        export_onnx(depth_model(), tmp_path / "out", photos, ExportSettings(precision="int8", max_error=1e-9))


@pytest.mark.long
def test_a_model_that_keeps_as_many_tokens_as_an_image_needs(photos, tmp_path):
    model = convert(lively(FAMILIES["timm vit"]()), score="similarity", bypass="merge", threshold=0.5, layers=[2, 3])
    check = export_onnx(model, tmp_path / "out", photos, ExportSettings(precision="int8", min_agreement=0.1, images=8))
    assert check.passed
