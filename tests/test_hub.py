"""Runs that are put on the hub and opened from there, by processes of their own, since the hub's library reads where it
is once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from hub import TOKEN, served
from safetensors.torch import save_file

from tosa_convert import convert, load, save
from tosa_convert.cli.main import main
from tosa_convert.models.adapter import run
from tosa_convert.reporting.run_texts import write_card
from tosa_convert.runs import hub as hub_of_runs

OPEN = """
import sys, torch, tosa_convert
from tosa_convert.models.adapter import run
model = tosa_convert.load(sys.argv[1])
print(model.tosa_config.layers, run(model, torch.ones(1, 1, 28, 28))["logits"].sum().item())
"""


@pytest.fixture
def hub():
    with served() as found:
        yield found


def process(hub, home: Path, *arguments: str, token: str | None = TOKEN) -> subprocess.CompletedProcess:
    known = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    known |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    known |= {"HF_TOKEN": token} if token else {}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=known, check=False)


def test_a_run_goes_to_the_hub_and_opens_from_there(hub, quick_run, tmp_path):
    quick_run = shutil.copytree(quick_run, tmp_path / "run")
    recipe = yaml.safe_load((quick_run / "recipe.yaml").read_text())
    (quick_run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "data": {"train": "/data/images"}}))
    push = ("-m", "tosa_convert", "push", str(quick_run), "someone/fast-vit")
    done = process(hub, tmp_path / "here", *push)
    assert done.returncode == 0, done.stderr
    assert "pushed to" in done.stderr
    assert hub.private["someone/fast-vit"] is True
    files = hub.repositories["someone/fast-vit"]
    assert {"README.md", "config.json", "model.safetensors", "recipe.yaml"} <= set(files)
    assert files["model.safetensors"] == (quick_run / "model.safetensors").read_bytes()
    assert not any(name.startswith(("metrics", "checkpoint")) for name in files)
    for name in ("config.json", "README.md", "recipe.yaml"):
        assert str(quick_run.parent) not in files[name].decode()
        assert '"/' not in files[name].decode()
        assert "/data/images" not in files[name].decode()
    assert b"hf:someone/fast-vit" in files["README.md"]
    assert b"\n# someone/fast-vit\n" in files["README.md"]
    opened = process(hub, tmp_path / "there", "-c", OPEN, "hf:someone/fast-vit")
    assert opened.returncode == 0, opened.stderr
    model = load(quick_run)
    total = run(model, torch.ones(1, 1, 28, 28))["logits"].sum().item()
    layers, _, found = opened.stdout.strip().rpartition(" ")
    assert layers == str(model.tosa_config.layers)
    assert float(found) == pytest.approx(total, abs=1e-4)

    again = process(hub, tmp_path / "here", *push)
    assert again.returncode == 2
    assert "holds README.md, config.json" in again.stderr
    assert "--yes" in again.stderr
    assert process(hub, tmp_path / "here", *push, "--yes").returncode == 0


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        (None, "someone/vit", "hf auth login"),
        ("wrong", "someone/vit", "hf auth login"),
        (TOKEN, "a b/c/d", "give ORG/NAME"),
    ],
)
def test_a_push_that_cannot_be_says_why_in_one_line(hub, token, name, message, quick_run, tmp_path):
    done = process(hub, tmp_path, "-m", "tosa_convert", "push", str(quick_run), name, token=token)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not hub.repositories


@pytest.mark.long
def test_a_run_that_the_hub_does_not_show_is_said_to_be_so(hub, quick_run, tmp_path):
    """A private one, without a token: as the hub has it, there is none."""
    process(hub, tmp_path / "here", "-m", "tosa_convert", "push", str(quick_run), "someone/fast-vit")
    done = process(hub, tmp_path / "there", "-m", "tosa_convert", "flops", "hf:someone/fast-vit", token=None)
    assert done.returncode == 1
    assert "log in with `hf auth login`" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_nothing_is_pushed_with_places():
    recipe = {"checkpoint": "/home/me/w.safetensors", "data": {"train": "depth:/data/rooms", "eval": "hfds:org/set"}}
    kept = {"checkpoint": "w.safetensors", "data": {"train": "depth:rooms", "eval": "hfds:org/set"}}
    assert hub_of_runs._shortened(recipe) == kept
    sources = ["hfds:/home/me/set:test", "depth:/rooms?scale=2", "/my photos/of 2026", "~/photos", "https://a.b/c/d"]
    kept = ["hfds:set:test", "depth:rooms?scale=2", "of 2026", "photos", "https://a.b/c/d"]
    assert hub_of_runs._shortened(sources) == kept
    card = "## 3 images of /home/me/photos (see docs/guide.md), 1/2 of `~/more`, https://a.b/c"
    assert hub_of_runs._nameless(card) == "## 3 images of photos (see docs/guide.md), 1/2 of `more`, https://a.b/c"


def test_a_hub_out_of_reach_is_said(hub, quick_run, tmp_path):
    hub.address = "http://127.0.0.1:9"
    done = process(hub, tmp_path, "-m", "tosa_convert", "push", str(quick_run), "someone/vit")
    assert done.returncode == 1
    assert "the hub cannot be reached" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.long
def test_a_model_on_a_hub_out_of_reach_is_said_in_one_line(hub, tmp_path):
    """Long, since the hub's library tries six times."""
    hub.address = "http://127.0.0.1:9"
    done = process(hub, tmp_path, "-m", "tosa_convert", "flops", "hf:someone/vit")
    assert done.returncode == 1
    assert "the hub cannot be reached" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_only_a_run_is_pushed(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["push", str(tmp_path), "someone/vit"])
    assert stop.value.code == 2
    assert "is not a run, nor a model folder" in capsys.readouterr().err


def test_a_card_says_what_a_run_is_and_a_text_of_ones_own_stays(quick_run, capsys):
    text = (quick_run / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "tosa-convert"
    assert "token-selective (score attention, bypass identity)" in body
    assert "## distill" in body
    config = json.loads((quick_run / "config.json").read_text())
    assert config["tosa_convert"] in body
    (quick_run / "README.md").write_text("mine")
    write_card(quick_run)
    assert (quick_run / "README.md").read_text() == "mine"
    (quick_run / "README.md").write_text(text)


def test_no_licence_is_claimed_of_weights_of_ones_own(tmp_path):
    weights = tmp_path / "mine.safetensors"
    save_file(timm.create_model("deit_tiny_patch16_224").state_dict(), weights)
    own, plain = load("deit_tiny", checkpoint=weights), load("deit_tiny", pretrained=False)
    folders = [save(convert(model), tmp_path / name) for name, model in (("own", own), ("plain", plain))]
    for folder in folders:
        write_card(folder)
    cards = [(folder / "README.md").read_text() for folder in folders]
    heads = [yaml.safe_load(card.split("---\n", 2)[1]) for card in cards]
    assert not {"license", "base_model"} & set(heads[0])
    assert "under apache-2.0" not in cards[0]
    assert heads[1]["license"] == "apache-2.0"
