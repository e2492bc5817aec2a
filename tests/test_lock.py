"""One process at a time writes to a folder; what is killed holds nothing."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tosa_convert import DistillSettings, FinetuneSettings, UsageError, convert, distill, finetune, load
from tosa_convert.cli.main import main
from tosa_convert.runs.lock import alone
from tosa_convert.workflows.quickstart import MARK, run_quickstart

HOLD = """
import sys, time
from pathlib import Path
from tosa_convert.runs.lock import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    ) as found:
        assert found.stdout.readline() == "held\n"
        yield found
        found.kill()


def test_a_second_process_is_refused_until_the_first_is_gone(holder, tmp_path, capsys):
    arguments = ["distill", "quickstart", "--layers", "2", "--steps", "1", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "another tosa-convert is writing to" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with alone(tmp_path / "other"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with alone(tmp_path / "run"):
        pass


def test_two_quickstarts_do_not_share_a_folder(holder, tmp_path):
    """Found: the second one deleted the images that the first worked on."""
    kept = tmp_path / "run" / "data" / "mine.png"
    kept.parent.mkdir(parents=True)
    kept.touch()
    (tmp_path / "run" / MARK).write_text("{}")
    with pytest.raises(UsageError, match="another tosa-convert is writing to"):
        run_quickstart(tmp_path / "run", lambda command: None)
    assert kept.exists()


def test_a_folder_is_free_again_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), alone(tmp_path):
        raise ZeroDivisionError
    with alone(tmp_path):
        with alone(tmp_path):
            pass  # by whoever holds it
        with ThreadPoolExecutor(1) as other, pytest.raises(UsageError, match="another"):
            other.submit(alone(tmp_path).__enter__).result()
    with alone(tmp_path):
        pass


def test_training_in_python_holds_its_folder_too(holder, tmp_path):
    model = convert(load("quickstart"), score="norm")
    with pytest.raises(UsageError, match="another tosa-convert is writing to"):
        finetune(model, settings=FinetuneSettings(steps=1), out=tmp_path / "run")
    with pytest.raises(UsageError, match="another tosa-convert is writing to"):
        distill(convert(load("quickstart")), settings=DistillSettings(steps=1), out=tmp_path / "run")
