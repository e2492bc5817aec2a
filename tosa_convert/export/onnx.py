"""ONNX, and the proof that it does what the torch model does."""

import contextlib
import copy
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from onnxscript import rewriter
from torch import nn

from tosa_convert.base.errors import TosaError, UsageError
from tosa_convert.base.files import check_writable, read_json, write_json
from tosa_convert.base.progress import Progress
from tosa_convert.config.settings import ExportSettings
from tosa_convert.export.chain import BEFORE, smaller
from tosa_convert.export.check import Check
from tosa_convert.export.files import deliver, remove, save_graph
from tosa_convert.export.quiet import silence
from tosa_convert.export.verification import CHOSEN, Verifier, hide_chosen, other_sizes
from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.models.preprocessing import Preprocessing
from tosa_convert.models.provenance import class_names, preprocessing_of
from tosa_convert.selective.selection import forget, keeps_any_number, last_choices
from tosa_convert.tasks.task import task_of

FILE, FAILED, FACTS = "model.onnx", "model.failed.onnx", "preprocessing.json"
SIDES = ("height", "width")


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
        UsageError: any size is wanted of a model that takes one size.
        FailedCheckError: the file is not near enough to the torch model; it is then called ``model.failed.onnx``.
    """
    folder, settings = Path(folder), settings or ExportSettings()
    model = _plain(model)
    original = _plain(original) if original is not None else None
    task = task_of(model)
    images = task.read(data, preprocessing_of(model))
    labelled = settings.labels and task.has_labels(images, model)
    if settings.any_size:
        _refuse_one_size(model)
    progress = progress or Progress()
    sizes = adapter_of(model).any_size() if settings.any_size else contextlib.nullcontext()
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with sizes, tempfile.TemporaryDirectory(prefix=".export-", dir=folder, ignore_cleanup_errors=True) as scratch:
        file = Path(scratch) / "float32.onnx"
        write_graph(model, file, settings.opset, settings.any_size)
        verifier = Verifier(model, images, task, labelled, settings, original, progress)
        if settings.precision == "float32":
            check = verifier.check({"float32": file})["float32"]
        else:
            if original is not None:
                write_graph(original, Path(scratch) / BEFORE, settings.opset, settings.any_size)
            file, check = smaller(file, verifier, images, settings, progress)
        deliver(file, folder / (FILE if check.passed else FAILED))
    remove(folder / (FAILED if check.passed else FILE))
    _write_facts(model, folder, check, settings)
    if not check.passed:
        raise FailedCheckError(check, folder / FAILED)
    return check


def exported(folder: Path) -> dict[str, Path]:
    """The checked file that an export left in a folder, by its precision; nothing if there is none."""
    if not (folder / FILE).exists() or not (folder / FACTS).exists():
        return {}
    return {read_json(folder / FACTS).get("precision", "float32"): folder / FILE}


def _plain(model: nn.Module) -> nn.Module:
    """The model in eval mode if it is in float32 on the CPU, else a copy that is: the caller's stays where it is."""
    weight = next(model.parameters())
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    return (model if plain else copy.deepcopy(model).cpu().float()).eval()


class FailedCheckError(TosaError):
    """The ONNX file does not do what the torch model does; ``check`` says how far off it is."""

    def __init__(self, check: Check, path: Path):
        self.check = check
        if check.bounds:
            near = ", ".join(
                f"{name} {check.figures[name]:.4f} (asked: {bound})" for name, bound in check.bounds.items()
            )
            super().__init__(
                f"in {check.precision}{' with every mix of operators' if check.precision == 'int8' else ''} the model "
                f"is too far from float32: {near}; the file is marked as {path}; take another --precision or "
                "--calibration, or allow more (--min-agreement, --min-cosine, --max-error)"
            )
            return
        super().__init__(
            f"ONNX Runtime and torch agree on {check.agreement:.2%} of {check.images} images, below the threshold of "
            f"{check.threshold:.0%}; the file is marked as {path}; try another --opset"
            f"{', or leave --any-size out' if len(check.sizes) > 1 else ', or inspect it'}"
        )


class _Graph(nn.Module):
    """The model as tensor → named tensors, with the chosen tokens of each selective layer after its outputs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        found = run(self.model, images)
        chosen = {f"{CHOSEN}{layer}": choice.attended for layer, choice in last_choices(self.model).items()}
        return {**found, **chosen}


def write_graph(model: nn.Module, path: Path, opset: int, any_size: bool = False) -> None:
    """The ONNX file of a float32 model on the CPU, unchecked; any batch size, or one image at a time where each keeps
    as many tokens as it needs; the model's own image size or any."""
    preprocessing, adapter = preprocessing_of(model), adapter_of(model)
    # Where images keep different numbers of tokens they make no batch with one row each.
    alone = keeps_any_number(model)
    size, shape = preprocessing.size, {} if alone else {0: torch.export.Dim("batch")}
    if any_size:
        size = other_sizes(model)[0]  # of no model's own, or its position embedding would be taken as it is
        sides = [
            torch.export.Dim(name, min=2, max=4096 // patch) for name, patch in zip(SIDES, adapter.patch, strict=True)
        ]
        sides = sides[:1] * 2 if adapter.square else sides
        shape |= {axis: patch * side for axis, patch, side in zip((2, 3), adapter.patch, sides, strict=True)}
    example = torch.randn(1 if alone else 2, preprocessing.channels, *size)
    graph = _Graph(model)
    with torch.no_grad():
        names = list(graph(example))
    try:
        with silence(), _quick_rules(), torch.no_grad(), adapter.exporting():
            program = torch.onnx.export(
                graph,
                (example,),
                input_names=["images"],
                output_names=names,
                dynamic_shapes={"images": shape},
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:
        raise TosaError(f"torch.onnx could not export the model: {_gist(error)}") from error
    finally:
        forget(model)  # tracing leaves symbolic tensors behind
    proto = program.model_proto
    hide_chosen(proto)
    save_graph(proto, path)
    onnx.checker.check_model(path)


def _gist(error: Exception) -> str:
    """What went wrong, of a message that is advice to those who write exporters for the most part."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return " ".join(text.rpartition("## Exception summary")[2].split())[:200]


@torch.inference_mode()
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


def _write_facts(model: nn.Module, folder: Path, check: Check, settings: ExportSettings) -> None:
    preprocessing: Preprocessing = preprocessing_of(model)
    sides = SIDES if settings.any_size else preprocessing.size
    facts = {
        "file": FILE if check.passed else FAILED,
        "status": "passed" if check.passed else "failed",
        "input": {
            "name": "images",
            "shape": [1 if keeps_any_number(model) else "batch", preprocessing.channels, *sides],
            "type": "float32",
            "colour": preprocessing.mode,
            "scaled_to": [0, 1],
        },
        **preprocessing.model_dump(mode="json"),
        "classes": class_names(model),
        "opset": settings.opset,
        "precision": check.precision,
        "check": check.to_dict(),
    }
    write_json(folder / FACTS, facts)


@contextlib.contextmanager
def _quick_rules() -> Iterator[None]:
    """The exporter's optimiser without its rule "slices that make up a split".

    The rule compares each slice with every node of the graph, which takes nine tenths of an export, and finds nothing
    in a graph that gathers tokens. An onnxscript that keeps its rules elsewhere exports as well, only slower.
    """
    rules = getattr(rewriter, "_DEFAULT_REWRITE_RULES", None)
    if rules is not None:
        rewriter._DEFAULT_REWRITE_RULES = tuple(rule for rule in rules if rule.name != "SlicesSplit")
    try:
        yield
    finally:
        if rules is not None:
            rewriter._DEFAULT_REWRITE_RULES = rules
