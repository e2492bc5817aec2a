"""Small random-weight instances of the real classes, small photos, and no network."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.resources import files
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp()

import hypothesis
import numpy as np
import pytest
import torch
from families import CORE, FAMILIES
from PIL import Image
from torch import nn

torch.set_num_threads(1)  # the tests run in two processes
hypothesis.settings.register_profile("untimed", deadline=None)  # no test asserts a timing
hypothesis.settings.load_profile("untimed")

LAYERS = [2, 4, 6]
QUICK = ["--layers", "2,4,6", "--ratio", "0.5", "--steps", "2", "--batch-size", "2"]
"""Of a command that trains."""


def pytest_configure(config):
    """Tests are the same with a GPU and without, but for those that are of it."""
    if "cuda" not in config.getoption("markexpr").replace("not cuda", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights large enough that attention is not uniform and choices differ between images."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model.eval()


@pytest.fixture(params=CORE)
def family(request) -> nn.Module:
    """One model of each kind that differs for the methods."""
    torch.manual_seed(0)
    return lively(FAMILIES[request.param]())


@pytest.fixture
def vit() -> nn.Module:
    """A small timm ViT that knows its photos and can be saved."""
    from tosa_convert import load

    model = load("quickstart")
    model.eval()
    return model


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def fashion_sample() -> zipfile.ZipFile:
    """The built-in images, ``train/`` and ``test/``."""
    return zipfile.ZipFile(str(files("tosa_convert") / "assets" / "fashion_sample.zip"))


def write_images(folder, count: int, classes: list[str] | None = None, size: int = 32) -> None:
    """Random photos, spread over class folders if there are any."""
    random = np.random.default_rng(0)
    for index in range(count):
        place = folder / classes[index % len(classes)] if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 255, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{index:03d}.png")


@pytest.fixture
def photos(tmp_path):
    """A flat folder of eight photos."""
    write_images(tmp_path / "photos", 8)
    return tmp_path / "photos"


@pytest.fixture
def labelled(tmp_path):
    """Twenty photos in the ten class folders of the quickstart's model."""
    write_images(tmp_path / "labelled", 20, [f"{label}-class" for label in range(10)])
    return tmp_path / "labelled"


@pytest.fixture
def outlined(tmp_path):
    """Images whose bright rectangle is the mask, and boxes that say the same."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    write_images(images, 6, ["a", "b", "c", "d", "e"])
    masks.mkdir()
    boxes: dict = {"images": [], "annotations": []}
    for number, file in enumerate(sorted(images.rglob("*.png"))):
        left, top = 4 + number % 5, 6 + number % 3
        pixels = np.zeros((32, 32, 3), np.uint8)
        pixels[top : top + 12, left : left + 14] = 255
        fresh = file.with_name(f"{number:03d}.png")
        file.unlink()
        Image.fromarray(pixels).save(fresh)
        Image.fromarray(pixels[..., 0]).save(masks / fresh.name)
        boxes["images"].append({"id": number, "file_name": f"x/{fresh.name}"})
        boxes["annotations"].append({"image_id": number, "bbox": [left, top, 14, 12]})
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    return images, masks, tmp_path / "boxes.json"


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    """The same images in every form that is read; {form: source}."""
    from image_sources import sources_in

    return sources_in(tmp_path_factory.mktemp("sources"))


@pytest.fixture
def backbone() -> nn.Module:
    """A converted model that gives tokens."""
    from token_models import converted_backbone

    return converted_backbone()


@pytest.fixture(scope="session")
def graphs(tmp_path_factory) -> Path:
    """A folder of ONNX files by the model they are of, for :func:`shared_exports`; one for all processes of a run."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "graphs"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def shared_exports(graphs, monkeypatch):
    """For tests of what is done with an ONNX file: that of a model is made once, and copied for equal models."""
    from tosa_convert.export import onnx as module

    write = module.write_graph

    def write_once(model, path, *options):
        state = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
        known = (
            graphs
            / hashlib.sha256(
                repr((type(model), getattr(model, "tosa_config", None), options)).encode() + state
            ).hexdigest()
        )
        if not known.exists():
            write(model, path, *options)
            made = known.with_suffix(f".{os.getpid()}")
            shutil.copyfile(path, made)
            made.replace(known)  # whole or not at all, for the other process
        shutil.copyfile(known, path)

    monkeypatch.setattr(module, "write_graph", write_once)


@pytest.fixture
def tosa(shared_exports, capsys, tmp_path, monkeypatch):
    """Runs a command in a folder of its own; returns its exit code, stdout and stderr."""
    from tosa_convert.cli.main import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return stop.value.code or 0, printed.out, printed.err

    return run


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory):
    """A finished distill run of the quickstart's model, made by the command line."""
    from tosa_convert.cli.main import main

    out = tmp_path_factory.mktemp("session") / "run"
    arguments = ["--layers", "2,4,6", "--ratio", "0.5", "--steps", "2", "--batch-size", "2", "--json"]
    with pytest.raises(SystemExit) as stop:
        main(["distill", "quickstart", *arguments, "--out", str(out)])
    assert stop.value.code == 0
    return out


def run_recipe(recipe: str, out: Path, processes: int) -> str:
    """Runs a recipe by the command line, in as many processes; gives what it printed."""
    file = out.with_suffix(".yaml")
    file.write_text(recipe)
    launcher = ["torch.distributed.run", "--nproc-per-node", str(processes), "--standalone", "-m"]
    ours = ["tosa_convert", "run", str(file), "--out", str(out), "--device", "cpu"]
    command = [sys.executable, "-m", *(launcher if processes > 1 else []), *ours]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_resuming(train, make, folder, monkeypatch):
    """That a training which is killed at its fifth step goes on to what it would have come to; gives the model.

    Args:
        train: of a model, ``train(model, out=..., resume=...)``, with a line of metrics and a checkpoint at each step.
        make: gives the model to train, the same each time.
    """
    from tosa_convert.base.errors import UsageError
    from tosa_convert.runs.metrics_log import read_metrics
    from tosa_convert.training import engine

    class KilledError(Exception):
        pass

    note = engine._Recorder.note

    def killed_at_five(self, step, *args, **kwargs):
        if step == 5:
            raise KilledError
        note(self, step, *args, **kwargs)

    whole = make()
    train(whole, out=folder / "whole", resume=False)
    with monkeypatch.context() as patched:
        patched.setattr(engine._Recorder, "note", killed_at_five)
        with pytest.raises(KilledError):
            train(make(), out=folder / "cut", resume=False)
    assert json.loads((folder / "cut/checkpoint/step.json").read_text())["step"] == 4
    resumed = make()
    train(resumed, out=folder / "cut", resume=True)
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    noted = folder / "cut/checkpoint/step.json"
    if noted.exists():
        kept = json.loads(noted.read_text())
        for change, message in (
            ({"processes": 2}, r"begun with 2 processes .* --nproc-per-node 2"),
            ({"seed": 77, "batch_size": 99}, "another seed and batch_size .* give seed 77, batch_size 99 as before"),
        ):
            noted.write_text(json.dumps({**kept, **change}))
            with pytest.raises(UsageError, match=message):
                train(make(), out=folder / "cut", resume=True)
    losses = [[line["loss"] for line in read_metrics(folder / name)] for name in ("whole", "cut")]
    assert losses[0] == losses[1]
    return whole
