"""The command line: help, runs of one's own making, and what is refused before any work."""

import json

import pytest
from conftest import QUICK

from tosa_convert import load
from tosa_convert.cli.main import main

COMMANDS = [
    *("bench", "compare", "distill", "doctor", "eval", "export", "features", "finetune", "flops", "models", "plan"),
    *("push", "quickstart", "recipes", "report", "run", "show"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, tosa):
    code, out, err = tosa(command, "--help")
    assert code == 0, err
    assert "Usage" in out


def test_help_names_every_command(tosa):
    words = [line.split() for line in tosa("--help")[1].splitlines()]
    listed = {line[1] for line in words if len(line) > 2 and line[0] == "│"}
    assert set(COMMANDS) <= listed


@pytest.mark.long
def test_a_model_saved_from_python_goes_through_every_command(tosa, tmp_path):
    from tosa_convert import convert, save

    save(convert(load("quickstart"), layers=[2, 4], ratio=0.5), tmp_path / "saved")
    model = load("quickstart")
    del model.tosa_origin  # as if made by timm alone
    model.tosa_origin = load("quickstart").tosa_origin.model_copy(update={"source": None})
    save(convert(model, layers=[2], ratio=0.5), tmp_path / "unknown")
    for name, original in (("saved", True), ("unknown", False)):
        code, out, err = tosa("eval", name, "--json")
        if original:
            assert code == 0, err
            assert "original" in json.loads(out)["models"]
        else:
            assert code == 2
            assert "nothing can be measured" in err
        assert tosa("export", name, "--onnx")[0] == 0
        code, _, err = tosa("finetune", name, "--steps", "1", "--batch-size", "2", "--out", f"{name}-tuned")
        assert code == 0, err
    assert tosa("finetune", "saved", "--ratio", "0.3")[0] == 2


def test_a_resumed_run_must_be_the_same_job(tosa, quick_run):
    command = ["distill", "quickstart", *QUICK, "--out", quick_run, "--resume"]
    assert tosa(*command)[0] == 0
    code, _, err = tosa(*command, "--ratio", "0.25")
    assert code == 2
    assert "convert.ratio" in err


def test_steps_and_epochs_exclude_each_other(tosa, tmp_path):
    text = "model: quickstart\ndistill: {epochs: 1, batch_size: 2}\nconvert: {layers: [2]}\n"
    (tmp_path / "mine.yaml").write_text(text)
    code, out, err = tosa("distill", "--recipe", "mine.yaml", "--steps", "2", "--out", "made", "--json")
    assert code == 0, err
    assert json.loads(out)["steps"] == 2
    assert tosa("distill", "quickstart", "--steps", "2", "--epochs", "1")[0] == 2


def test_messages_are_not_read_as_markup(tosa):
    _, _, err = tosa("flops", "./[/old]")
    assert "[/old]" in err


def test_an_unfinished_folder_of_stages_is_explained(tosa, quick_run, tmp_path):
    import shutil

    shutil.copytree(quick_run, tmp_path / "all/distill")
    (tmp_path / "all/recipe.yaml").write_text("model: x\n")
    code, _, err = tosa("eval", "all")
    assert code == 2
    assert "name one of them: distill" in err


def test_the_quickstart_clears_only_what_it_made(tmp_path):
    from tosa_convert import UsageError
    from tosa_convert.workflows.quickstart import _clear

    (tmp_path / "out/data").mkdir(parents=True)
    (tmp_path / "out/mine").mkdir()
    with pytest.raises(UsageError, match="not an earlier quickstart"):
        _clear(tmp_path / "out")
    (tmp_path / "out/quickstart.json").write_text("{}")
    _clear(tmp_path / "out")
    assert (tmp_path / "out/mine").exists()
    assert not (tmp_path / "out/data").exists()


@pytest.mark.parametrize("rows", ["16,64", "lots", "-3"])
def test_rows_are_one_number_or_all(rows, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["flops", "quickstart", f"--rows={rows}"])
    assert stopped.value.code == 2
    assert "give one number, such as 32, or all" in capsys.readouterr().err


def test_a_file_is_no_place_for_results(tmp_path, capsys):
    (tmp_path / "file").touch()
    for command in (["bench", "quickstart"], ["distill", "quickstart", "--steps", "1"]):
        with pytest.raises(SystemExit) as stopped:
            main([*command, "--out", str(tmp_path / "file")])
        assert stopped.value.code == 2
        assert "is a file; choose a folder" in capsys.readouterr().err
