"""What stays in float so that a file with fewer bits is near enough, and what is said where nothing is."""

import json
import math

import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from token_models import FEW, plain

from tosa_convert import ExportSettings, export_onnx
from tosa_convert.cli.main import main
from tosa_convert.export import chain, gate
from tosa_convert.export.check import margin
from tosa_convert.export.onnx import FailedCheckError


@pytest.mark.usefixtures("shared_exports")
def test_auto_keeps_the_fastest_of_what_is_near_enough(backbone, photos, tmp_path):
    check = export_onnx(backbone, tmp_path / "out", photos, ExportSettings(precision="auto", **FEW))
    assert set(check.tried) == {"float32", "float16", "int8", "int8 static"}
    assert check.passed
    assert check.tried[check.precision].startswith("passed")


def with_an_outlier() -> VisionTransformer:
    """In its third block one hidden unit is far larger than the others, and no weight reads it: where the MLP's second
    product is quantised, nothing is left of the others."""
    model = plain()
    with torch.no_grad():
        model.blocks[2].mlp.fc1.bias[0] = 1e4
        model.blocks[2].mlp.fc2.weight[:, 0] = 0
    return model


def test_what_hurts_stays_in_float_and_nothing_else(photos, tmp_path):
    check = export_onnx(
        with_an_outlier(), tmp_path / "out", photos, ExportSettings(precision="int8", min_cosine=0.99, images=8)
    )
    assert check.passed
    assert len(check.left) == 1
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    weights = {tensor.name: tensor.dims for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights]
    assert [node.name for node in products] == check.left
    assert list(weights[products[0].input[1]]) == [256, 64]


@pytest.mark.long
def test_operators_are_chosen_anew_where_some_images_did_not_tell(photos, tmp_path, monkeypatch):
    """As if all operators had been near enough on the first images."""
    seen, real = [], chain.within_tolerance

    def blind_at_first(int8, file, judge, layers, progress):
        seen.append(len(judge.feeds))
        if len(seen) > 1:
            return real(int8, file, judge, layers, progress)
        int8.write(file)
        return []

    monkeypatch.setattr(chain, "EXAMPLES", 4)
    monkeypatch.setattr(chain, "within_tolerance", blind_at_first)
    check = export_onnx(with_an_outlier(), tmp_path / "out", photos, ExportSettings(precision="int8", images=8))
    assert check.passed
    assert seen == [4, 8]
    assert len(check.left) == 1


@pytest.mark.long
@pytest.mark.usefixtures("shared_exports")
def test_a_tolerance_that_no_mix_meets_fails_and_is_marked(backbone, photos, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"of an earlier export")
    with pytest.raises(FailedCheckError, match="no mix of operators"):
        export_onnx(backbone, tmp_path, photos, ExportSettings(precision="int8", min_cosine=1.0, images=8))
    assert not (tmp_path / "model.onnx").exists()
    assert (tmp_path / "model.failed.onnx").exists()
    assert json.loads((tmp_path / "preprocessing.json").read_text())["status"] == "failed"


class Counted:
    """Stands for the files: each operator left in float takes its harm away."""

    def __init__(self, harms: list[float]):
        self.operators = [str(index) for index in range(len(harms))]
        self.harms, self.left = dict(zip(self.operators, harms, strict=True)), []

    def write(self, file, left=()):
        self.left = list(left)

    def margin(self, file, images=None) -> float:
        return 1.0 - sum(harm for name, harm in self.harms.items() if name not in self.left)


@given(st.lists(st.floats(0, 2, allow_nan=False), min_size=1, max_size=24), st.integers(1, 6))
def test_the_gate_meets_the_tolerance_or_says_that_no_mix_does(harms, layers):
    model = Counted(harms)
    left = gate.within_tolerance(model, None, model, layers, gate.Progress())
    if left is None:
        assert model.left == []
        assert min(harms) > 1 - 1e-9  # not even one operator could be quantised
        return
    assert model.left == left
    assert model.margin(None) >= -1e-9
    if left:  # not even the most harmless of them could be quantised, too
        assert model.margin(None) - min(model.harms[name] for name in left) < 1e-9


@given(st.floats(-1, 1), st.floats(-1, 1))
def test_a_margin_is_that_of_the_worst_figure(cosine, error):
    bounds = {"patch": 0.5, "error": 0.1}
    assert margin({"patch": cosine, "error": error}, bounds) == min(cosine - 0.5, 0.1 - error)
    assert margin({"patch": math.nan, "error": error}, bounds) < 0


@pytest.mark.usefixtures("shared_exports")
@pytest.mark.long
def test_what_a_failed_export_found_is_shown(tmp_path, capsys):
    arguments = ["--task", "depth", "--precision", "float16", "--max-error", "1e-12", "--images", "2"]
    with pytest.raises(SystemExit) as stop:
        main(["export", "quickstart", *arguments, "--out", str(tmp_path / "out")])
    assert stop.value.code == 1
    shown, said = capsys.readouterr()
    assert "NOT near enough to float32" in shown
    assert "model.failed.onnx" in said.strip().splitlines()[-1]
