"""Commands that are killed at any moment, or run out of room: nothing half-written under a final name, and what is
resumed ends as if nothing had happened. Run with ``-m long``; three quarters of an hour on two cores."""

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
import yaml
from conftest import write_images
from safetensors.torch import load_file

from tosa_convert import load, save
from tosa_convert.selective.conversion import convert

MOMENTS = {"distill": 15, "finetune": 15, "export": 10, "plan": 10}
TRAINING = {"steps": 60, "batch_size": 8, "checkpoint_minutes": 0.005, "log_every": 1}
SLACK = 1.5
"""Seconds for a step, the writing of a checkpoint, and a busy machine."""
PARTS = {
    "distill": {"layers": [2, 4], "ratio": 0.5},
    "finetune": {"score": "similarity", "bypass": "merge", "layers": [2, 4], "ratio": 0.5},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Photos, recipes, and a run to export."""
    folder = tmp_path_factory.mktemp("trust")
    write_images(folder / "photos", 24)
    for stage, parts in PARTS.items():
        recipe = {"model": "quickstart", "data": {"train": str(folder / "photos")}, "convert": parts, stage: TRAINING}
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(recipe))
    save(convert(load("quickstart"), layers=[2, 4], ratio=0.5), folder / "run")
    return folder


def command(verb: str, place: Path, out: Path, again: bool = False) -> list[str]:
    photos = ["--data", str(place / "photos")]
    given = {
        "distill": ["run", str(place / "distill.yaml")],
        "finetune": ["run", str(place / "finetune.yaml")],
        "export": ["export", str(place / "run"), *photos, "--precision", "int8", "--min-agreement", "0.1"],
        "plan": ["plan", "quickstart", *photos, "--budget", "0.9", "--images", "8"],
    }[verb]
    resumed = ["--resume"] if again and verb in PARTS else []
    return [sys.executable, "-m", "tosa_convert", *given, "--out", str(out), *resumed]


def check_whole(folder: Path) -> None:
    """Every file under a final name is complete."""
    for path in folder.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(folder).parts) or "checkpoint" in path.parts:
            continue
        if path.suffix == ".safetensors":
            load_file(path)
        if path.suffix == ".onnx":
            onnx.checker.check_model(path)
        if path.suffix == ".json":
            json.loads(path.read_text())


def check_lost(folder: Path) -> None:
    """No more work is gone than is done between two checkpoints: what was logged after the newest whole one."""
    steps = [json.loads(path.read_text())["step"] for path in folder.rglob("checkpoint*/step.json")]
    logs = list(folder.rglob("metrics.jsonl"))
    lines = [json.loads(line) for line in logs[0].read_text().splitlines()] if logs else []
    if not lines or lines[-1]["step"] == TRAINING["steps"]:
        return
    kept = max(steps, default=0)
    since = [line["seconds"] for line in lines if line["step"] >= kept]
    assert since[-1] - since[0] < 60 * TRAINING["checkpoint_minutes"] + SLACK, (kept, since)


def final_weights(folder: Path) -> dict:
    (file,) = folder.glob("*/model.safetensors")
    return {name: value.tolist() for name, value in load_file(file).items()}


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("verb", MOMENTS)
def test_killed_at_any_moment(verb, place, tmp_path):
    began = time.monotonic()
    subprocess.run(command(verb, place, tmp_path / "whole"), check=True, capture_output=True)
    seconds = time.monotonic() - began
    drawn = random.Random(0)
    for number in range(MOMENTS[verb]):
        out = tmp_path / f"out{number}"
        process = subprocess.Popen(command(verb, place, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(drawn.uniform(0.2, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if out.exists():
            check_whole(out)
            if verb in PARTS:
                check_lost(out)
            if verb == "plan":
                shutil.rmtree(out)  # a plan is made anew
        done = subprocess.run(command(verb, place, out, out.exists()), capture_output=True, text=True, check=False)
        assert done.returncode == 0, (number, done.stderr)
        check_whole(out)
        if verb in PARTS:
            assert final_weights(out) == final_weights(tmp_path / "whole"), number
        if verb == "plan":
            assert (out / "plan.yaml").read_text().splitlines()[6:] == (
                tmp_path / "whole" / "plan.yaml"
            ).read_text().splitlines()[6:]
        shutil.rmtree(out)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("verb", MOMENTS)
@pytest.mark.parametrize("room", [0, 200, 5_000, 100_000, 2_000_000])
def test_no_room(verb, room, place, tmp_path):
    """A file can have so many bytes, as on a disk that is full by then."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    out = tmp_path / "out"
    done = subprocess.run(
        command(verb, place, out), capture_output=True, text=True, check=False, preexec_fn=limit, cwd=tmp_path
    )
    if out.exists():
        check_whole(out)
    if done.returncode:
        assert "Traceback" not in done.stderr
        assert "error:" in done.stderr
    else:
        assert out.exists()
