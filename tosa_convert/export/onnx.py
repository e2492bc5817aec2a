"""ONNX, and the proof that it does what the torch model does."""

import contextlib
import copy
import io
import logging
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from onnxscript import rewriter
from torch import nn

from tosa_convert.base.errors import TosaError, UsageError
from tosa_convert.base.files import atomic, write_json
from tosa_convert.base.progress import Progress
from tosa_convert.config.settings import ExportSettings
from tosa_convert.export.verification import CHOSEN, Check, check_file, other_sizes
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

    What an earlier export left in the folder is replaced only when the new file has been checked.

    Args:
        model: a supported model, converted or not; exported in float32 for any batch size, and for its own image size
            or, if the settings say so, for any.
        folder: where the files go, made if missing.
        data: images for the check; class sub-folders give top-1. None takes the built-in photos.
        settings: operator set, threshold, number of images.
        original: the model before its conversion, for its top-1 beside the others.

    Raises:
        UsageError: any size is wanted of a model that takes one size.
        FailedCheckError: the agreement is below the threshold; the file is then called
            ``model.failed.onnx``.
    """
    folder, settings = Path(folder), settings or ExportSettings()
    model = _plain(model)
    original = _plain(original) if original is not None else None
    task = task_of(model)
    images = task.read(data, preprocessing_of(model))
    labelled = settings.labels and task.has_labels(images, model)
    if settings.any_size:
        _refuse_one_size(model)
    sizes = adapter_of(model).any_size() if settings.any_size else contextlib.nullcontext()
    with sizes, atomic(folder / FILE) as fresh:
        write_graph(model, fresh, settings.opset, settings.any_size)
        check = check_file(model, fresh, images, task if labelled else None, settings, original, progress or Progress())
        if not check.passed:
            (folder / FILE).unlink(missing_ok=True)
            os.replace(fresh, folder / FAILED)
            _write_facts(model, folder, check, settings)
            raise FailedCheckError(check, folder / FAILED)
    (folder / FAILED).unlink(missing_ok=True)
    _write_facts(model, folder, check, settings)
    return check


def _plain(model: nn.Module) -> nn.Module:
    """The model in eval mode if it is in float32 on the CPU, else a copy that is: the caller's stays where it is."""
    weight = next(model.parameters())
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    return (model if plain else copy.deepcopy(model).cpu().float()).eval()


class FailedCheckError(TosaError):
    """The ONNX file does not do what the torch model does; ``check`` says how far off it is."""

    def __init__(self, check: Check, path: Path):
        self.check = check
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
        with _silence(), _quick_rules(), torch.no_grad(), adapter.exporting():
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
    _hide_chosen(proto)
    onnx.checker.check_model(proto)
    onnx.save_model(proto, path)


def _gist(error: Exception) -> str:
    """What went wrong, of a message that is advice to those who write exporters for the most part."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return " ".join(text.rpartition("## Exception summary")[2].split())[:200]


def _hide_chosen(proto: onnx.ModelProto) -> None:
    """The chosen tokens stay in the graph by name, but are no outputs of the delivered file."""
    kept = [output for output in proto.graph.output if not output.name.startswith(CHOSEN)]
    del proto.graph.output[:]
    proto.graph.output.extend(kept)


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


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The exporter prints its steps and warns about its own internals."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
