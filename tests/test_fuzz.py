"""Files that are damaged in any way: one line that says so, no traceback, and nothing written."""

import contextlib
import json
import shutil
from pathlib import Path

import hypothesis
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tosa_convert import TosaError, convert, load, save
from tosa_convert.config.recipe import find_recipe, read_recipe
from tosa_convert.export.runtimes import onnx_runner
from tosa_convert.models.loading import read_checkpoint
from tosa_convert.runs.folder import load_run

FEW, MANY = 25, 2500
"""Cases of each test in an ordinary run, and in a long one: 10,000 of all four."""
often = pytest.mark.parametrize("cases", [FEW, pytest.param(MANY, marks=[pytest.mark.long, pytest.mark.timeout(3600)])])

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**6), 10**12),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["1e9", "-", "{}"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)


def places_in(tree: object, way: tuple = ()) -> list[tuple]:
    """The ways to all values of nested lists and dictionaries."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [way, *(place for key, value in items for place in places_in(value, (*way, key)))]


def changed(tree: object, way: tuple, value: object) -> object:
    """A copy with another value in a place."""
    if not way:
        return value
    copied = dict(tree) if isinstance(tree, dict) else list(tree)
    copied[way[0]] = changed(copied[way[0]], way[1:], value)
    return copied


def damaged(content: bytes, draw) -> bytes:
    """Bytes cut off, changed, or put in."""
    kind = draw(st.sampled_from(["cut", "changed", "put in", "other"]))
    place = draw(st.integers(0, max(0, min(len(content) - 1, 4096))))
    if kind == "cut":
        return content[:place]
    if kind == "changed":
        return content[:place] + draw(st.binary(min_size=1, max_size=8)) + content[place + 1 :]
    if kind == "put in":
        return content[:place] + draw(st.binary(min_size=1, max_size=64)) + content[place:]
    return draw(st.binary(max_size=256))


def fuzz(cases: int, test) -> None:
    """Run a test that takes hypothesis's ``data`` so many times."""
    quiet = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large]
    hypothesis.settings(max_examples=cases, suppress_health_check=quiet, database=None)(given(st.data())(test))()


def fine_or_refused(opened) -> None:
    """It opens, or says why not; any other error goes through."""
    with contextlib.suppress(TosaError):
        opened()


@often
def test_recipes(cases, tmp_path):
    recipe = yaml.safe_load(find_recipe("quickstart").read_text())
    file = tmp_path / "recipe.yaml"

    def test(data):
        if data.draw(st.booleans()):
            tree = changed(recipe, data.draw(st.sampled_from(places_in(recipe))), data.draw(values))
            file.write_text(yaml.safe_dump(tree))
        else:
            file.write_bytes(damaged(yaml.safe_dump(recipe).encode(), data.draw))
        fine_or_refused(lambda: read_recipe(file))
        assert list(tmp_path.iterdir()) == [file]

    fuzz(cases, test)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of a model so small that opening it takes a few milliseconds."""
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    save(convert(load("test_vit", pretrained=False), layers=[2], ratio=0.5), folder)
    return folder


@often
def test_configs(cases, run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    # What makes models larger is left alone: a config may ask for as many layers as it likes.
    places = [way for way in places_in(config) if not {"model_args", "pretrained_cfg"} & set(way)]

    def test(data):
        if data.draw(st.booleans()):
            tree = changed(config, data.draw(st.sampled_from(places)), data.draw(values))
            (folder / "config.json").write_text(json.dumps(tree))
        else:
            (folder / "config.json").write_bytes(damaged(json.dumps(config).encode(), data.draw))
        fine_or_refused(lambda: load_run(folder))
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]

    fuzz(cases, test)


@often
def test_weights(cases, run, tmp_path):
    whole = (run / "model.safetensors").read_bytes()
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    pickled = tmp_path / "weights.pth"
    torch.save({"weight": torch.ones(3)}, pickled)
    as_pickle = pickled.read_bytes()

    def test(data):
        if data.draw(st.booleans()):
            (folder / "model.safetensors").write_bytes(damaged(whole, data.draw))
            fine_or_refused(lambda: load_run(folder))
        else:
            pickled.write_bytes(damaged(as_pickle, data.draw))
            fine_or_refused(lambda: read_checkpoint(pickled))

    fuzz(cases, test)


@often
def test_onnx_files(cases, tmp_path):
    import onnx

    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["images"], ["found"])],
        "small",
        [onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [1, 3])],
        [onnx.helper.make_tensor_value_info("found", onnx.TensorProto.FLOAT, [1, 3])],
    )
    whole = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10
    ).SerializeToString()
    file = tmp_path / "model.onnx"

    def test(data):
        file.write_bytes(damaged(whole, data.draw))
        fine_or_refused(lambda: onnx_runner(file, [torch.ones(1, 3)], 1, "cpu")())

    fuzz(cases, test)


def test_a_damaged_checkpoint_of_a_name_is_one_line(tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(TosaError, match=r"weights\.safetensors"):
        load("deit_tiny", checkpoint=tmp_path / "weights.safetensors")
