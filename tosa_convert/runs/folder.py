"""Run directories: what a stage of work leaves behind, and how it opens again.

A finished run holds ``recipe.yaml`` (resolved), ``model.safetensors``, ``config.json``,
``metrics.jsonl`` and ``report.md``. ``config.json`` is written last: a folder without it is an
interrupted run, which ``--resume`` continues from ``checkpoint/``.
"""

import contextlib
import os
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from tosa_convert.base.errors import TosaError, UsageError, gist
from tosa_convert.base.files import atomic, check_writable, read_json, write_json, write_text
from tosa_convert.config.conversion import ConvertConfig, unknown_options
from tosa_convert.config.validation import build as validated
from tosa_convert.models.provenance import Origin, build
from tosa_convert.runs.provenance import origin_of
from tosa_convert.selective.conversion import convert, is_converted

FORMAT, FORMAT_VERSION = "tosa-convert run", 3
"""Version 1 noted the options of all parts; since 3 there are parts and options that 0.2.0 does not know."""
OURS = {"recipe.yaml", "config.json", "metrics.jsonl", "checkpoint", "distill", "finetune", "convert"}
"""By which a folder is known as one of ours, finished or not."""
SOURCE = "source.json"
"""What a run that is not finished was begun from."""
RUNS = Path("runs")
HISTORY = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "tosa-convert" / "runs.tsv"
"""Which runs were made from which folder; see :func:`remember`."""


def save(model: nn.Module, folder: str | Path, **extra: Any) -> Path:
    """Write a model, converted or not, so that ``load(folder)`` gives it back.

    Each file appears whole or not at all, and ``config.json`` last.

    Args:
        model: a supported model; its weights are opened as float32 again.
        folder: made if missing.
        **extra: JSON-able facts to keep in ``config.json`` (the stage, its results).
    """
    folder = Path(folder)
    origin = origin_of(model)
    state = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    with atomic(folder / "model.safetensors") as temporary:
        try:
            save_file(state, temporary)
        except Exception as error:
            raise OSError(None, str(error)) from error
    config = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "tosa_convert": version("tosa-convert"),
        "created": datetime.now().isoformat(timespec="seconds"),
        **extra,
        "convert": model.tosa_config.model_dump() if is_converted(model) else None,
        "proof": getattr(model, "tosa_proof", None),
        "origin": origin.model_dump(mode="json"),
    }
    write_json(folder / "config.json", config)
    return folder


def is_run(folder: str | Path) -> bool:
    """Whether a folder holds a finished run; a folder of something else, whatever it holds, does not."""
    path = Path(folder) / "config.json"
    try:
        return path.exists() and f'"{FORMAT}"' in path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def is_converted_run(folder: str | Path) -> bool:
    """Whether a folder holds a finished run of a converted model."""
    return is_run(folder) and bool(read_json(Path(folder) / "config.json").get("convert"))


def check_finished(folder: Path) -> None:
    """
    Raises:
        TosaError: an interrupted run.
        UsageError: a folder of runs, or of something else.
    """
    if is_run(folder):
        return
    inside = sorted(path.parent.name for path in folder.glob("*/config.json") if is_run(path.parent))
    if inside:
        raise UsageError(f"{folder} holds runs; name one of them: {', '.join(inside)}")
    if (folder / "recipe.yaml").exists():
        raise TosaError(f"{folder} is an interrupted run; finish it with the same command and --resume")
    raise UsageError(f"{folder} is not a run, nor a model folder with a config.json; name the folder of one")


def load_run(folder: str | Path) -> nn.Module:
    """The model of a finished run, in eval mode.

    Raises:
        TosaError: not a run, an interrupted or damaged one, or one written by a newer version.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():  # with one, what is wrong in it is said
        check_finished(folder)
    config = read_json(folder / "config.json")
    written = config.get("version", 0)
    if not isinstance(written, int):
        raise TosaError(f"the run {folder} is damaged (version {written!r}); run its recipe again")
    if written > FORMAT_VERSION:
        raise TosaError(
            f"{folder} was written by a newer tosa-convert ({config.get('tosa_convert')}); upgrade to open it"
        )
    try:
        conversion = _conversion(config)
        model: Any = build(Origin(**config["origin"]))
        if config.get("proof"):  # of the weights that were trained, not of the random ones that it has here
            model.tosa_proof = config["proof"]
        if conversion is not None:
            convert(model, conversion)
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    except UsageError:
        raise
    except Exception as error:
        raise TosaError(f"the run {folder} is damaged ({gist(error)}); run its recipe again") from error
    model.tosa_origin = Origin(**config["origin"])
    return model


def _conversion(config: dict) -> ConvertConfig | None:
    """How a run was converted.

    Raises:
        UsageError: by a score, bypass or schedule of someone's own that has not been imported.
    """
    values = config.get("convert")
    if not values:
        return None
    if config.get("version", 0) < 2:
        unused = unknown_options(values)
        values = {name: value for name, value in values.items() if name not in unused}
    return validated(ConvertConfig, values)


def remember(folder: Path) -> None:
    """Note a finished run of this working folder, so that it is found wherever it lies."""
    line = f"{Path.cwd()}\t{folder.resolve()}"
    with contextlib.suppress(OSError, TosaError):  # a convenience: a home read-only or full must not fail the run
        kept = [known for known in _remembered() if known != line][-200:]
        HISTORY.parent.mkdir(parents=True, exist_ok=True)
        write_text(HISTORY, "\n".join([*kept, line]) + "\n")


def _remembered() -> list[str]:
    return HISTORY.read_text(encoding="utf-8").splitlines() if HISTORY.exists() else []


def newest(start: Path = Path()) -> Path:
    """The run finished last, among ``./runs/*``, ``./runs/*/*``, ``./*`` and those made from this folder."""
    found = [path.parent for pattern in ("runs/*", "runs/*/*", "*") for path in start.glob(f"{pattern}/config.json")]
    elsewhere = [line.split("\t")[1] for line in _remembered() if line.startswith(f"{start.resolve()}\t")]
    found += [Path(folder) for folder in elsewhere if (Path(folder) / "config.json").exists()]
    found = [folder for folder in found if is_run(folder)]
    if not found:
        raise UsageError("there is no run here yet; name one, or make one with `tosa-convert distill MODEL`")
    return max(found, key=lambda folder: (folder / "config.json").stat().st_mtime_ns)


def new_folder(name: str) -> Path:
    """A fresh folder name under ./runs for a model and the time of day."""
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    return next(
        path
        for path in (RUNS / f"{stem}{tail}" for tail in ("", *(f"-{i}" for i in range(2, 100))))
        if not path.exists()
    )


def prepare(folder: Path, resume: bool | None = None) -> None:
    """Check that results may be written here, before any work is done; None: they cannot be resumed.

    Raises:
        UsageError: something is there already, and ``resume`` was not asked for, or it is no run.
        TosaError: the place cannot be written to.
    """
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if found and not resume:
        way_on = "" if resume is None else "add --resume to go on with the run in it, or "
        raise UsageError(f"{folder} is not empty; {way_on}choose another --out")
    if found and not found & OURS and not any(name.endswith(".part") for name in found):  # which a kill leaves
        raise UsageError(f"{folder} holds no run that could be resumed; name one, or choose another --out")
    check_writable(folder)


def discard(folder: Path) -> None:
    """Take back a run that was refused before its work began; anything else in the folder stays."""
    names = {path.name for path in folder.iterdir()}
    if names and names <= {"recipe.yaml", SOURCE}:
        for name in names:
            (folder / name).unlink()
        folder.rmdir()
        if folder.parent == RUNS and not any(RUNS.iterdir()):
            RUNS.rmdir()
