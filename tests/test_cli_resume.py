"""What is left of a run that was stopped, refused or finished, and how it goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import QUICK

from tosa_convert import load
from tosa_convert.base.errors import InterruptedTrainingError
from tosa_convert.config.recipe import Recipe
from tosa_convert.runs.metrics_log import read_metrics
from tosa_convert.workflows import pipeline


def test_a_recipe_runs_all_its_stages_and_resumes(tosa, labelled, tmp_path):
    text = f"""
model: quickstart
data: {{train: {labelled}, eval: {labelled}}}
convert: {{layers: [2, 4], ratio: 0.5}}
distill: {{steps: 2, batch_size: 2}}
finetune: {{steps: 2, batch_size: 2}}
export: {{images: 8}}
"""
    (tmp_path / "mine.yaml").write_text(text)
    code, out, err = tosa("run", "mine.yaml", "--out", "all")
    assert code == 0, err
    assert (tmp_path / "all/finetune/model.onnx").exists()
    assert load(tmp_path / "all/distill").tosa_config.layers == [2, 4]
    assert tosa("run", "mine.yaml", "--out", "all")[0] == 2
    stamp = (tmp_path / "all/distill/model.safetensors").stat().st_mtime_ns
    (tmp_path / "all/finetune/config.json").unlink()
    (tmp_path / "mine.yaml").write_text(text.replace("distill: {steps: 2", "distill: {steps: 3"))
    code, out, err = tosa("run", "mine.yaml", "--out", "all", "--resume")
    assert code == 2
    assert "all/distill was started with other settings (distill.steps)" in err
    assert "steps: 3" not in (tmp_path / "all/recipe.yaml").read_text(), "it is the run's, not the refused one's"
    shutil.rmtree(tmp_path / "all/finetune")  # a stage that is not begun may be mended
    mended = text.replace("finetune: {steps: 2", "finetune: {steps: 1").replace("export: {images: 8}\n", "")
    (tmp_path / "mine.yaml").write_text(mended)
    code, out, err = tosa("run", "mine.yaml", "--out", "all", "--resume")
    assert code == 0, err
    assert (tmp_path / "all/distill/model.safetensors").stat().st_mtime_ns == stamp
    assert (tmp_path / "all/finetune/config.json").exists()
    code, out, err = tosa("run", "mine.yaml", "--out", "all/finetune", "--resume")
    assert code == 2
    assert "all/finetune is a stage of a run, not the run; resume its parent folder: --out all --resume" in err


def test_a_conversion_alone_is_resumed_as_it_was_begun(tosa, tmp_path):
    text = "model: quickstart\nconvert: {layers: [2, 4], ratio: 0.5, score: norm}\n"
    (tmp_path / "mine.yaml").write_text(text)
    assert tosa("run", "mine.yaml", "--out", "all")[0] == 0
    assert tosa("run", "mine.yaml", "--out", "all", "--resume")[0] == 0
    (tmp_path / "mine.yaml").write_text(text.replace("0.5", "0.25"))
    code, out, err = tosa("run", "mine.yaml", "--out", "all", "--resume")
    assert code == 2
    assert "all/convert was started with other settings (convert.ratio)" in err
    (tmp_path / "mine.yaml").write_text(text + "data: {train: elsewhere}\n")
    assert tosa("run", "mine.yaml", "--out", "all", "--resume")[0] == 0, "what it is counted on makes no difference"


def test_an_interrupted_run_is_resumed_as_a_whole(labelled, tmp_path, monkeypatch):
    def interrupted(recipe, out, **options):
        raise InterruptedTrainingError(f"interrupted at step 1; go on with the same command and --out {out} --resume")

    monkeypatch.setattr(pipeline, "distill_stage", interrupted)
    recipe = Recipe(**{"model": "quickstart", "data": {"train": str(labelled)}, "distill": {"steps": 2}})
    with pytest.raises(InterruptedTrainingError, match=f"--out {tmp_path / 'all'} --resume"):
        pipeline.run_recipe(recipe, tmp_path / "all", report=print)


@pytest.mark.parametrize("source", ["nowhere", "wds:nowhere"])
def test_what_is_measured_after_a_training_is_opened_before_it(source, labelled, tosa, tmp_path):
    text = f"model: quickstart\ndata: {{train: {labelled}, eval: '{source}'}}\ndistill: {{steps: 1}}\n"
    (tmp_path / "mine.yaml").write_text(text)
    code, _, err = tosa("run", "mine.yaml", "--out", "all")
    assert code == 2
    assert "nowhere" in err
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize("before", ["convert: {method: tome}", "distill: {steps: 1}"])
def test_a_refused_run_leaves_no_folder(photos, tosa, tmp_path, before):
    text = f"model: quickstart\ndata: {{train: {photos}}}\nfinetune: {{steps: 1, mixup: 0.8}}\n"
    (tmp_path / "mine.yaml").write_text(f"{text}{before}\n")
    code, _, err = tosa("run", "mine.yaml", "--out", "all")
    assert code == 2
    assert "none to learn from" in err
    assert not (tmp_path / "all").exists()


def test_options_override_the_recipe_and_the_resolved_one_is_kept(tosa, tmp_path):
    recipe = "model: quickstart\nconvert: {layers: [2], ratio: 0.5}\ndistill: {steps: 1, batch_size: 2, lr: 0.01}\n"
    (tmp_path / "mine.yaml").write_text(recipe)
    code, _, err = tosa("distill", "--recipe", "mine.yaml", "--ratio", "0.25", "--steps", "2", "--out", "made")
    assert code == 0, err
    from tosa_convert.config.recipe import read_recipe

    kept = read_recipe(tmp_path / "made/recipe.yaml")
    assert (kept.convert.layers, kept.convert.ratio) == ([2], 0.25)
    assert (kept.distill.steps, kept.distill.lr) == (2, 0.01)


def test_a_finished_run_is_not_overwritten(tosa, quick_run):
    before = (quick_run / "model.safetensors").read_bytes()
    assert tosa("distill", "quickstart", *QUICK, "--out", quick_run)[0] == 2
    assert (quick_run / "model.safetensors").read_bytes() == before


def test_only_a_run_of_the_same_stage_and_source_is_resumed(tosa, quick_run, photos, tmp_path):
    short = ("--steps", 1, "--batch-size", 2, "--data", photos)
    code, _, err = tosa("finetune", quick_run, *short, "--out", photos, "--resume")
    assert code == 2
    assert "holds no run that could be resumed" in err
    assert not list(photos.glob("*.yaml"))
    copied = tmp_path / "copied"
    shutil.copytree(quick_run, copied)
    code, _, err = tosa("finetune", copied, *short, "--out", copied, "--resume")
    assert code == 2
    assert "is a finished distill run; give finetune a folder of its own" in err or "other settings" in err
    code, _, err = tosa("finetune", copied, *short, "--out", "new", "--resume")
    assert code == 0, err
    assert "nothing to resume in new yet" in err
    assert not (tmp_path / "new/source.json").exists()
    for name in ("config.json", "report.md"):  # as a kill would leave it
        (tmp_path / "new" / name).unlink()
    (tmp_path / "new/source.json").write_text(json.dumps({"source": "other", "sha256": "0"}))
    code, _, err = tosa("finetune", copied, *short, "--out", "new", "--resume")
    assert code == 2
    assert "new was started from other with other weights than" in err


def test_what_a_kill_at_the_very_end_left_out_is_made_up_for(tosa, quick_run, photos, tmp_path):
    train = ("finetune", quick_run, "--steps", 1, "--batch-size", 2, "--data", photos, "--out", "new")
    assert tosa(*train)[0] == 0
    (tmp_path / "new/report.md").unlink()
    (tmp_path / "new/checkpoint").mkdir()
    assert tosa(*train, "--resume")[0] == 0
    assert (tmp_path / "new/report.md").exists()
    assert not (tmp_path / "new/checkpoint").exists()


@pytest.mark.parametrize("labels", ["eval_labels: false", "eval_labels: true"])
def test_labels_that_do_not_fit_are_told_before_the_training(labels, labelled, photos, tosa, tmp_path):
    for index in range(3):
        (tmp_path / f"albums/{index}").mkdir(parents=True)
        shutil.copy(next(photos.rglob("*.png")), tmp_path / f"albums/{index}/a.png")
    (tmp_path / "mine.yaml").write_text(
        f"model: quickstart\ndata: {{train: {photos}, eval: albums, {labels}}}\nconvert: {{layers: [2]}}\n"
        "distill: {steps: 1, batch_size: 2}\nexport: {labels: false}\n"
    )
    code, _, err = tosa("run", "mine.yaml", "--out", "all")
    if labels.endswith("true"):
        assert code == 2
        assert "albums has 3 classes but the model has 10 outputs" in err
        assert "set data.eval_labels to false" in err
        assert not (tmp_path / "all").exists()
    else:
        assert code == 0, err


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_an_interrupted_training_resumes_by_command(number, tosa, labelled, tmp_path):
    """Ctrl-C, as the terminal sends it, or what a service manager sends, in the middle of the training."""
    (tmp_path / "slow.yaml").write_text(
        f"model: quickstart\ndata: {{train: {labelled}}}\nconvert: {{layers: [2]}}\n"
        "distill: {steps: 40, batch_size: 16, log_every: 1}\n"
    )
    command = ["distill", "--recipe", "slow.yaml", "--out", "cut"]
    process = subprocess.Popen([sys.executable, "-m", "tosa_convert", *command], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "cut/metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in err
    assert "Traceback" not in err
    assert (tmp_path / "cut/checkpoint/step.json").exists(), "Ctrl-C writes a checkpoint"
    assert tosa("export", "cut")[0] == 1
    code, out, err = tosa(*command, "--resume", "--json")
    assert code == 0, err
    steps = [line["step"] for line in read_metrics(tmp_path / "cut")]
    assert steps == list(range(1, 41))
