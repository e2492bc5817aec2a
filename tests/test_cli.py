"""The command line as a person runs it: what it prints, what it leaves, how it exits."""

import json
import shutil
import subprocess
import sys

import onnxruntime
import pytest
import torch
from conftest import QUICK, write_images
from families import FAMILIES

from tosa_convert import TosaError, load
from tosa_convert.cli.main import main
from tosa_convert.runs import folder as runs


@pytest.mark.parametrize("name", ["hf DepthAnything", pytest.param("hf DPT", marks=pytest.mark.long)])
def test_a_depth_model_goes_the_whole_way_with_its_head(tosa, photos, name, tmp_path):
    torch.manual_seed(0)
    FAMILIES[name]().save_pretrained(tmp_path / "model")
    code, out, err = tosa("distill", "model", *QUICK, "--data", photos, "--out", "run")
    assert code == 0, err
    assert "neck" in "".join(load("run").state_dict()), "the depth head stays"
    code, out, err = tosa("export", "run", "--data", photos, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["passed"]
    assert found["difference"] < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "run" / "model.onnx"))
    assert [output.name for output in session.get_outputs()] == ["predicted_depth"]


def test_the_whole_way_from_a_model_to_a_checked_file(tosa, labelled, tmp_path):
    code, out, err = tosa("distill", "quickstart", *QUICK, "--data", labelled, "--out", "a")
    assert code == 0, err
    assert "overlap" in out
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
        "recipe.yaml",
        "report.md",
        "README.md",
    }
    code, out, err = tosa("finetune", "a", "--data", labelled, "--steps", "2", "--batch-size", "2", "--out", "b")
    assert code == 0, err
    code, out, err = tosa("eval", "b", "--data", labelled)
    assert code == 0, err
    assert all(word in out for word in ("original", "converted", "random selection", "top-1", "agreement"))
    code, out, err = tosa("flops", "b")
    assert code == 0, err
    assert "saved" in out
    code, out, err = tosa("export", "b", "--onnx", "--data", labelled)
    assert code == 0, err
    assert "passed" in out
    assert (tmp_path / "b/model.onnx").exists()
    report = (tmp_path / "b/report.md").read_text()
    assert all(word in report for word in ("finetune →", "random selection", "in ONNX Runtime", "MACs"))


def test_the_newest_run_is_used_when_none_is_named(tosa, tmp_path):
    assert tosa("flops")[0] == 2
    assert tosa("distill", "quickstart", *QUICK)[0] == 0
    assert tosa("distill", "quickstart", *QUICK, "--out", "later")[0] == 0
    code, out, err = tosa("flops", "--json")
    assert code == 0
    assert "using the newest run, later" in err
    assert json.loads(out)["saved"] > 0
    assert runs.newest(tmp_path) == tmp_path / "later"


def test_a_run_made_elsewhere_from_here_is_the_newest_too(tosa, tmp_path):
    assert tosa("distill", "quickstart", *QUICK, "--out", tmp_path / "deep/er/still")[0] == 0
    assert "deep/er/still" in tosa("flops", "--json")[2]


def test_the_version_is_told(tosa):
    assert tosa("--version")[1].startswith("tosa-convert 0.")


@pytest.mark.parametrize(
    "command",
    [
        ["distill", "quickstart", *QUICK, "--out", "made"],
        ["finetune", "{run}", "--steps", "1", "--batch-size", "2", "--out", "made"],
        ["flops", "{run}"],
        ["flops", "deit_tiny", "--layers", "2,4"],
        ["eval", "{run}"],
        pytest.param(["export", "{run}", "--onnx", "--out", "made"], marks=pytest.mark.long),
        ["models", "deit_tiny"],
        ["models"],
        ["recipes", "ls"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_json_is_json_and_nothing_else(command, tosa, quick_run, tmp_path):
    run = shutil.copytree(quick_run, tmp_path / "run")  # some of the commands leave their results in it
    code, out, err = tosa(*(part.format(run=run) for part in command), "--json")
    assert code == 0, err
    assert json.loads(out)


@pytest.mark.parametrize("score", ["attention", "impact"])
def test_a_selector_that_was_never_trained_is_not_finetuned_around(score, tosa, labelled):
    code, out, err = tosa("finetune", "quickstart", "--score", score, "--data", labelled, "--steps", 1)
    assert code == 2
    assert f"score {score} would choose at random: distill quickstart with the same options first" in err


@pytest.mark.parametrize(("key", "value"), [("opt", "adamww"), ("opt", "adahessian"), ("aa", "garbage")])
def test_what_timm_does_not_know_is_told_before_the_first_stage(key, value, labelled, tosa, tmp_path):
    text = f"model: quickstart\ndata: {{train: {labelled}}}\ndistill: {{steps: 1}}\n"
    text += f"finetune: {{steps: 1, {key}: {value}}}\n"
    (tmp_path / "mine.yaml").write_text(text)
    for command in (["recipes", "validate", "mine.yaml"], ["run", "mine.yaml", "--out", "all"]):
        code, _, err = tosa(*command)
        assert code == 2
        assert value in err
    assert not (tmp_path / "all").exists()
    (tmp_path / "first.yaml").write_text("model: quickstart\ndistill: {opt: adamww}\n")
    assert tosa("recipes", "validate", "first.yaml")[0] == 2


def test_recipes_are_listed_copied_and_checked(tosa, tmp_path):
    assert "dinov2_small_518" in tosa("recipes", "ls")[1]
    assert tosa("recipes", "cp", "quickstart", "mine.yaml")[0] == 0
    assert tosa("recipes", "validate", "mine.yaml")[0] == 0
    assert tosa("recipes", "cp", "quickstart", "mine.yaml")[0] == 2
    (tmp_path / "mine.yaml").write_text("modle: x\n")
    code, _, err = tosa("recipes", "validate", "mine.yaml")
    assert code == 2
    assert "did you mean 'model'" in err


def test_models_are_told_apart_by_the_code_that_converts(tosa):
    rows = {row["model"]: row for row in json.loads(tosa("models", "*tiny_patch*", "--json")[1])}
    assert rows["deit_tiny_patch16_224"]["supported"] == "yes"
    assert rows["eva02_tiny_patch14_224"]["supported"] == "yes"
    assert rows["swin_tiny_patch4_window7_224"]["supported"] == "no"
    assert "within windows" in rows["swin_tiny_patch4_window7_224"]["remark"]
    assert tosa("models", "no-such-model")[0] == 2


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (["distill"], 2, "name a model"),
        (["distill", "quickstart", "--layers", "1"], 2, "start at 2"),
        (["distill", "quickstart", "--layers", "2,99"], 2, "layers 1 to 12"),
        (["distill", "quickstart", "--layers", "2,3"], 2, "neighbours"),
        (["distill", "quickstart", "--layers", "two"], 2, "write it like 2,4,6"),
        (["distill", "quickstart", "--ratio", "0"], 2, "above 0 and at most 1"),
        (["distill", "quickstart", "--ratio", "1.2"], 2, "above 0 and at most 1"),
        (["distill", "quickstart", "--steps", "0"], 2, "--steps 0 is out of range; give 1 or more"),
        (["plan", "quickstart", "--images", "0"], 2, "--images 0 is out of range; give 1 or more"),
        (["export", "quickstart", "--images", "0"], 2, "--images 0 is out of range; give 1 or more"),
        (["bench", "quickstart", "--batch-size", "1,0"], 2, "--batch-size 0 is out of range; give 1 or more"),
        (["flops", "quickstart", "--device", "warp"], 2, "device 'warp' is not known"),
        (["export", "quickstart", "--device", "warp"], 2, "device 'warp' is not known"),
        (["show", "quickstart", "--device", "warp"], 2, "device 'warp' is not known"),
        (["distill", "resnet18", "--out", "made"], 1, "not a ViT"),
        (["flops", "swin_tiny_patch4_window7_224"], 1, "within windows"),
        (["flops", "nonsuch"], 2, "tosa-convert models"),
        (["distill", "deit_tiny", "--out", "made"], 1, "--checkpoint FILE"),
        (["distill", "quickstart", "--data", "nowhere"], 2, "no folder of images at nowhere"),
        (["distill", "quickstart", "--resume"], 2, "--resume needs --out"),
        (["distill", "quickstart", "--bogus"], 2, "--bogus"),
        (["distill", "quickstart", "--device", "warp"], 2, "device"),
        (["finetune", "nowhere"], 2, "nowhere"),
        (["finetune", "quickstart", "--teacher", "--labels", "1"], 2, "leave out one of the two"),
        (["eval", "/nonexistent"], 2, "no folder"),
        (["run", "nowhere.yaml"], 2, "there is no file nowhere.yaml"),
        (["export", "quickstart", "--threshold", "7"], 2, "threshold"),
        (["flops", "quickstart", "--img-size", "29"], 2, "multiple of the patch size"),
        (["flops", "quickstart", "--img-size", "28x"], 2, "write it like 224, or 352x1120"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_gets_one_line_and_leaves_nothing(command, code, words, tosa, tmp_path):
    found, out, err = tosa(*command)
    assert found == code, err
    assert words in " ".join(err.split())
    assert "Traceback" not in err + out
    if "bogus" not in err:
        assert len(err.strip().splitlines()) <= 2
        assert err.strip().splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "runs").exists()


def test_a_wrong_class_count_and_an_empty_folder_are_refused(tosa, quick_run, tmp_path):
    write_images(tmp_path / "three", 3, ["a", "b", "c"])
    (tmp_path / "empty").mkdir()
    code, _, err = tosa("finetune", quick_run, "--data", "three")
    assert (code, "3 classes but the model has 10" in err) == (2, True)
    code, _, err = tosa("eval", quick_run, "--data", "three")
    assert (code, "3 classes but the model has 10" in err) == (2, True)
    code, _, err = tosa("finetune", quick_run, "--data", "empty")
    assert (code, "contains no images" in err) == (2, True)


def test_broken_images_are_named_in_the_result(tosa, photos):
    (photos / "bad.png").write_bytes(b"no")
    _, out, _ = tosa("distill", "quickstart", *QUICK[:4], "--steps", "3", "--batch-size", "4", "--data", photos)
    assert "1 broken image skipped: bad.png" in out


@pytest.mark.parametrize("place", ["file", "occupied", "under a file"])
def test_places_that_cannot_be_written_are_refused_before_the_work(place, tosa, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied/mine.txt").write_text("mine")
    out = {"file": "file", "occupied": "occupied", "under a file": "file/deeper"}[place]
    code, _, err = tosa("distill", "quickstart", *QUICK, "--out", out)
    assert code == 2
    assert "--out" in err
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in (tmp_path / "occupied").iterdir()] == ["mine.txt"]


def test_debug_shows_the_traceback(tosa):
    code, _, err = tosa("flops", "nonsuch")
    assert (code, "Traceback" in err) == (2, False)
    command = [sys.executable, "-m", "tosa_convert", "flops", "nonsuch", "--debug"]
    debug = subprocess.run(command, capture_output=True, text=True, check=False)
    assert debug.returncode != 0
    assert "UsageError" in debug.stderr
    assert "loading.py" in debug.stderr


def test_an_export_below_its_threshold_exits_with_one(tosa, quick_run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "tosa_convert.export.verification.agreement", lambda kind, found, wanted: found.new_zeros(len(found))
    )
    run = shutil.copytree(quick_run, tmp_path / "run")
    code, _, err = tosa("export", run, "--onnx", "--out", "made")
    assert code == 1
    assert "below the threshold" in err


CONVERSION = ["layers", "ratio", "method", "score", "bypass", "schedule", "selection", "rows", "hidden", "kernel"]


@pytest.mark.parametrize("command", ["distill", "finetune", "bench", "flops", "show"])
def test_every_command_that_converts_has_every_conversion_option(command, tosa):
    code, out, err = tosa(command, "--help")
    assert code == 0, err
    assert all(f"--{name}" in out for name in CONVERSION)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 9"),
    ],
)
def test_what_does_not_fit_into_memory_says_what_to_do(error, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr("tosa_convert.workflows.inspection.flops_stage", full)
    with pytest.raises(SystemExit) as stopped:
        main(["flops", "quickstart"])
    assert stopped.value.code == 1
    assert "out of memory: use a smaller batch or smaller images" in capsys.readouterr().err


def test_what_a_home_cannot_take_does_not_fail_a_training(tosa, tmp_path, monkeypatch):
    def full(path, text):
        raise TosaError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr("tosa_convert.runs.folder.write_text", full)
    code, out, err = tosa("distill", "quickstart", *QUICK, "--out", "made")
    assert code == 0, err
    assert "made" in out


def test_figures_are_shown_where_their_run_cannot_keep_them(tosa, quick_run, monkeypatch):
    def full(*_, **__):
        raise TosaError("cannot write metrics.jsonl: Read-only file system")

    monkeypatch.setattr("tosa_convert.workflows.pipeline.append_metrics", full)
    code, out, err = tosa("eval", quick_run)
    assert code == 0, err
    assert "agreement" in out
    assert "the run does not keep these figures" in err


@pytest.mark.long
def test_albums_that_are_no_classes_are_checked_on_after_a_plan(tosa, tmp_path):
    """Found: the recipe that a plan without labels wrote was refused by its own run."""
    write_images(tmp_path / "albums", 6, ["spring", "summer", "autumn"])
    code, _, err = tosa("plan", "quickstart", "--data", "albums", "--images", 6, "--no-labels", "--out", "planned")
    assert code == 0, err
    code, _, err = tosa("run", "planned/plan.yaml", "--out", "out")
    assert code == 0, err


def test_albums_that_are_no_classes_are_told_before_the_conversion(tosa, tmp_path):
    write_images(tmp_path / "albums", 6, ["spring", "summer", "autumn"])
    (tmp_path / "recipe.yaml").write_text(
        "model: quickstart\nconvert: {method: tome}\ndata: {train: albums}\nexport: {images: 2}\n"
    )
    code, _, err = tosa("run", "recipe.yaml", "--out", "other")
    assert (code, "export.labels" in err) == (2, True)
    assert not (tmp_path / "other").exists()


@pytest.mark.long
def test_an_export_into_its_own_run_is_kept_by_it(tosa, quick_run, tmp_path):
    shutil.copytree(quick_run, tmp_path / "run")
    assert tosa("export", "run", "--out", "./run", "--images", 2)[0] == 0
    assert '"stage": "export"' in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_report_advises_commands_that_work(tosa, quick_run, tmp_path):
    shutil.copytree(quick_run, tmp_path / "runs/a/distill")
    _, out, _ = tosa("report", "runs/a/distill")
    assert "tosa-convert eval runs/a/distill" in (tmp_path / "runs/a/distill/report.html").read_text()
