"""ONNX, and the proof that it does what the torch model does."""

import contextlib
import copy
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from tosa_convert.base.errors import TosaError, UsageError
from tosa_convert.base.files import check_writable, read_json, write_json
from tosa_convert.base.progress import Progress
from tosa_convert.base.seeding import unmoved
from tosa_convert.base.timing import check_threads
from tosa_convert.config.settings import ExportSettings
from tosa_convert.export.chain import Chain
from tosa_convert.export.check import Check, margin
from tosa_convert.export.files import deliver, outputs_in, remove
from tosa_convert.export.graph import write_graph
from tosa_convert.export.ports import SIDES, Ports
from tosa_convert.export.runtimes import missing
from tosa_convert.export.speed import BEFORE, elsewhere
from tosa_convert.export.verification import Verifier, other_sizes
from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.models.modes import is_training
from tosa_convert.models.preprocessing import Preprocessing
from tosa_convert.models.provenance import class_names, preprocessing_of
from tosa_convert.runs.lock import alone
from tosa_convert.selective.selection import keeps_any_number
from tosa_convert.tasks.task import task_of

SCRATCH = ".export-"
FILE, FAILED, FACTS = "model.onnx", "model.failed.onnx", "preprocessing.json"


@unmoved()
def export_onnx(
    model: nn.Module,
    folder: str | Path,
    data: str | Path | None = None,
    settings: ExportSettings | None = None,
    *,
    original: nn.Module | None = None,
    progress: Progress | None = None,
) -> Check:
    """Write ``model.onnx`` and ``preprocessing.json``, and check the file in ONNX Runtime.

    In fewer bits the file is made of the float32 one, which is checked, too; the check's ``chain`` has the figures,
    sizes and speeds of all of them.

    What an earlier export left in the folder is replaced only when the new file has been checked.

    Args:
        model: a supported model, converted or not; exported for any batch size, and for its own image size or, if the
            settings say so, for any.
        folder: where the files go, made if missing.
        data: images for the check; class sub-folders give top-1. None takes the built-in photos.
        settings: operator set, precision, tolerances, number of images.
        original: the model before its conversion, for its figures and its speed beside the others.

    Raises:
        UsageError: any size is wanted of a model that takes one size, or another export is writing there.
        FailedCheckError: the file is not near enough to the torch model; it is then called ``model.failed.onnx``.
    """
    folder, settings = Path(folder), settings or ExportSettings()
    check_threads(settings.threads)
    if settings.also and (why := missing(settings.also, "cpu")):
        raise UsageError(why)
    model = _plain(model)
    original = _plain(original) if original is not None else None
    task = task_of(model)
    images = task.read(data, preprocessing_of(model))
    labelled = settings.labels and task.has_labels(images, model)
    if settings.any_size:
        _refuse_one_size(model)
    progress = progress or Progress()
    sizes = adapter_of(model).any_size() if settings.any_size else contextlib.nullcontext()
    how = settings.opset, settings.any_size, settings.raw_input
    check_writable(folder)
    with sizes, alone(folder), _gone_if_empty(folder), _scratch_in(folder) as scratch:
        file = Path(scratch) / "float32.onnx"
        with progress.busy("write the graph"):
            write_graph(model, file, *how)
        verifier = Verifier(model, images, task, labelled, settings, original, progress)
        if settings.precision == "float32":
            check = verifier.check({"float32": file})["float32"]
        else:
            if original is not None:
                # It is timed at the model's own size; any other would be for its own adapter to allow.
                write_graph(original, Path(scratch) / BEFORE, settings.opset, False, settings.raw_input)
            file, check = Chain(file, verifier, images, settings, progress).best()
        if settings.also:
            check.elsewhere = elsewhere(file, verifier, settings)
        outputs = outputs_in(file)
        deliver(file, folder / (FILE if check.passed else FAILED))
    remove(folder / (FAILED if check.passed else FILE))
    _write_facts(model, folder, check, settings, outputs)
    if not check.passed:
        raise FailedCheckError(check, folder / FAILED)
    return check


@contextlib.contextmanager
def _scratch_in(folder: Path) -> Iterator[str]:
    """A folder for files on the way to ``folder``; those of an export that was killed go."""
    for left in folder.glob(f"{SCRATCH}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder, ignore_cleanup_errors=True) as scratch:
        yield scratch


@contextlib.contextmanager
def _gone_if_empty(folder: Path) -> Iterator[None]:
    """A folder that was made for nothing goes."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def exported(folder: Path, size: tuple[int, int]) -> dict[str, Path]:
    """The checked file that an export left in a folder, by its precision; nothing if there is none that takes
    preprocessed images of this size, (rows, columns) in pixels."""
    if not (folder / FILE).exists() or not (folder / FACTS).exists():
        return {}
    facts = read_json(folder / FACTS)
    takes = facts.get("input", {})
    if takes.get("type") != "float32" or takes.get("shape", [])[-2:] not in (list(size), list(SIDES)):
        return {}
    return {facts.get("precision", "float32").split()[0]: folder / FILE}


def _plain(model: nn.Module) -> nn.Module:
    """The model if it is in float32 on the CPU, in eval mode, else a copy that is: the caller's stays as it is."""
    weight = next(model.parameters())
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32 and not is_training(model)
    return model if plain else copy.deepcopy(model).cpu().float().eval()


class FailedCheckError(TosaError):
    """The ONNX file does not do what the torch model does; ``results`` say how far off it is."""

    def __init__(self, check: Check, path: Path):
        self.results = {"file": str(path), **check.to_dict()}
        found = check.elsewhere
        if found and margin(found["figures"], found["bounds"]) < 0:
            super().__init__(
                f"in {found['runtime']} the file is too far from the model, on {found['images']} images: "
                f"{_beside(found['figures'], found['bounds'])}; it is marked as {path}; leave --also out to ship it "
                "for ONNX Runtime, or take another --precision or --calibration"
            )
            return
        if check.bounds:
            mixes = ", and no mix of operators in float is near enough" if check.precision.startswith("int8") else ""
            super().__init__(
                f"in {check.precision} the model is too far from float32: "
                f"{_beside(check.figures, check.bounds)}{mixes}; the file is marked as {path}; take another "
                "--precision or --calibration, or allow more (--min-agreement, --min-cosine, --max-error)"
            )
            return
        super().__init__(
            f"ONNX Runtime and torch agree on {check.agreement:.2%} of {check.images} images, below the threshold of "
            f"{check.threshold:.0%}; the file is marked as {path}; try another --opset"
            f"{', or leave --any-size out' if len(check.sizes) > 1 else ', or inspect it'}"
        )


def _beside(figures: dict[str, float], bounds: dict[str, float]) -> str:
    return ", ".join(f"{name} {figures[name]:.4f} (asked: {bound:g})" for name, bound in bounds.items())


@torch.no_grad()
def _refuse_one_size(model: nn.Module) -> None:
    preprocessing = preprocessing_of(model)
    try:
        with adapter_of(model).any_size():
            run(model, torch.zeros(1, preprocessing.channels, *other_sizes(model)[0]))
    except Exception:
        height, width = preprocessing.size
        raise UsageError(
            f"this model takes images of {height}×{width} only, so its file cannot take any size; leave --any-size out"
        ) from None


def _write_facts(model: nn.Module, folder: Path, check: Check, settings: ExportSettings, outputs: list[dict]) -> None:
    preprocessing: Preprocessing = preprocessing_of(model)
    ports, sides = Ports(preprocessing, settings.raw_input), SIDES if settings.any_size else preprocessing.size
    facts = {
        "file": FILE if check.passed else FAILED,
        "status": "passed" if check.passed else "failed",
        "input": {
            "name": "images",
            "shape": ports.shape(1 if keeps_any_number(model) else "batch", sides),
            "type": "uint8" if ports.raw else "float32",
            "colour": preprocessing.mode,
            "scaled_to": [0, 255] if ports.raw else [0, 1],
            "normalised": not ports.raw,
        },
        "outputs": outputs,
        # Pixels are normalised within the file.
        **preprocessing.model_dump(mode="json", exclude={"mean", "std"} if ports.raw else None),
        "classes": class_names(model),
        "opset": settings.opset,
        "precision": check.precision,
        "check": check.to_dict(),
    }
    write_json(folder / FACTS, facts)
