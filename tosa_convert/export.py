"""ONNX, and the proof that it does what the torch model does."""

import contextlib
import io
import logging
import os
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnxscript import opset18
from torch import nn

from tosa_convert.data import Images, check_classes, loader
from tosa_convert.errors import TosaError
from tosa_convert.evaluation import agreement
from tosa_convert.files import atomic, write_json
from tosa_convert.finetuning import outputs_of
from tosa_convert.hosts import host_of
from tosa_convert.origin import origin_of
from tosa_convert.preprocessing import Preprocessing
from tosa_convert.progress import Progress
from tosa_convert.selective import chosen_tokens
from tosa_convert.settings import ExportSettings

FILE, FAILED, FACTS = "model.onnx", "model.failed.onnx", "preprocessing.json"
CHOSEN = "chosen_"


@dataclass
class Check:
    """ONNX Runtime against torch on real pictures.

    Attributes:
        images: how many pictures.
        broken: names of those that could not be read.
        difference: largest absolute difference of an output.
        agreement: share of pictures with the same top-1 (models without a head: of close tokens).
        selected: per selective layer, share of the chosen tokens that both chose.
        top1: with labels, of "original", "torch" and "onnx".
        threshold: the agreement that was asked for.
    """

    images: int = 0
    broken: list[str] = field(default_factory=list)
    difference: float = 0.0
    agreement: float = 0.0
    selected: dict[int, float] = field(default_factory=dict)
    top1: dict[str, float] = field(default_factory=dict)
    threshold: float = 0.99

    @property
    def passed(self) -> bool:
        return self.images > 0 and self.agreement >= self.threshold

    def to_dict(self) -> dict:
        return {**asdict(self), "passed": self.passed}


def export_onnx(
    model: nn.Module,
    folder: str | Path,
    data: str | Path | None = None,
    settings: ExportSettings | None = None,
    *,
    original: nn.Module | None = None,
    progress: Progress | None = None,
) -> Check:
    """Write ``model.onnx`` (any batch size) and ``preprocessing.json``, and check the file in ONNX Runtime.

    Args:
        model: a supported model, converted or not; exported at its own image size.
        folder: where the files go, made if missing.
        data: pictures for the check; class sub-folders give top-1. None takes the built-in photos.
        settings: operator set, threshold, number of pictures.
        original: the model before its conversion, for its top-1 beside the others.

    Raises:
        TosaError: the agreement is below the threshold; the file is then called ``model.failed.onnx``.
    """
    folder, settings = Path(folder), settings or ExportSettings()
    model = model.cpu().eval()
    images = Images(data, origin_of(model).preprocessing)
    for name in (FILE, FAILED):
        (folder / name).unlink(missing_ok=True)
    with atomic(folder / FAILED) as temporary:  # it gets its real name when it has passed
        _write_graph(model, temporary, settings.opset)
    check = _check(model, folder / FAILED, images, settings, original, progress or Progress())
    _write_facts(model, folder, check, settings)
    if not check.passed:
        raise TosaError(
            f"ONNX Runtime and torch agree on {check.agreement:.2%} of {check.images} pictures, below the threshold of "
            f"{check.threshold:.0%}; the file is marked as {folder / FAILED}; try another --opset, or inspect it"
        )
    os.replace(folder / FAILED, folder / FILE)
    return check


class _Graph(nn.Module):
    """The model as tensor → named tensors, with the chosen tokens of each selective layer behind its outputs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        found = host_of(self.model).outputs(images)
        chosen = {f"{CHOSEN}{layer}": positions for layer, positions in chosen_tokens(self.model).items()}
        return {**found, **chosen}


def _write_graph(model: nn.Module, path: Path, opset: int) -> None:
    preprocessing = origin_of(model).preprocessing
    example = torch.randn(2, preprocessing.channels, *preprocessing.size)
    graph = _Graph(model)
    with torch.no_grad():
        names = list(graph(example))
    try:
        with _silence(), torch.no_grad(), host_of(model).exporting():
            program = torch.onnx.export(
                graph,
                (example,),
                input_names=["images"],
                output_names=names,
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                opset_version=opset,
                dynamo=True,
                custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
                verbose=False,
            )
    except Exception as error:
        raise TosaError(f"torch.onnx could not export the model: {' '.join(str(error).split())[:200]}") from error
    finally:
        for block in model.modules():  # tracing leaves symbolic tensors behind
            if getattr(block, "selection", None) is not None:
                block.selection.chosen = None
    proto = program.model_proto
    _hide_chosen(proto)
    onnx.checker.check_model(proto)
    onnx.save_model(proto, path)


def _stable_sort(self, *, stable=True, dim=-1, descending=False):
    """aten::sort.stable, which torch.onnx does not know: ONNX defines TopK to put the lower index first on ties."""
    size = opset18.Gather(opset18.Shape(self), opset18.Constant(value_ints=[dim]))
    return opset18.TopK(self, size, axis=dim, largest=int(descending), sorted=1)


def _hide_chosen(proto: onnx.ModelProto) -> None:
    """The chosen tokens stay in the graph by name, but are no outputs of the delivered file."""
    kept = [output for output in proto.graph.output if not output.name.startswith(CHOSEN)]
    del proto.graph.output[:]
    proto.graph.output.extend(kept)


def _with_chosen(path: Path) -> tuple[bytes, list[str]]:
    """The file's graph with the chosen tokens as outputs again, for the check."""
    proto = onnx.load(path)
    names = [name for node in proto.graph.node for name in node.output if name.startswith(CHOSEN)]
    for name in names:
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None))
    return proto.SerializeToString(), names


def _check(model, path: Path, images: Images, settings: ExportSettings, original, progress: Progress) -> Check:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    graph, chosen_names = _with_chosen(path)
    inspected = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"]) if chosen_names else None
    labelled = images.labelled and outputs_of(model) > 0
    if labelled:
        check_classes(images, outputs_of(model))
    check, agreed, right = Check(threshold=settings.threshold), 0.0, {"original": 0, "torch": 0, "onnx": 0}
    shared = dict.fromkeys(chosen_names, 0.0)
    # Spread over the folder, so that every class is seen.
    images = torch.utils.data.Subset(images, range(0, len(images), -(-len(images) // settings.images)))
    batches = loader(images, batch_size=8)
    with progress.track("check in ONNX Runtime", len(batches), unit="images", per_step=8) as advance:
        for batch in batches:
            check.broken += batch["broken"]
            if len(batch["images"]):
                feed = {"images": batch["images"].numpy()}
                with torch.inference_mode():
                    wanted = host_of(model).outputs(batch["images"])
                positions = {f"{CHOSEN}{layer}": value for layer, value in chosen_tokens(model).items()}
                found = [torch.from_numpy(value) for value in session.run(None, feed)]
                check.images += len(batch["images"])
                check.difference = max(check.difference, *map(_largest, found, wanted.values()))
                main = next(iter(wanted.values()))
                agreed += agreement(found[0], main).sum().item()
                if labelled:
                    outputs = {"torch": main, "onnx": found[0]}
                    if original is not None:
                        with torch.inference_mode():
                            outputs["original"] = host_of(original).outputs(batch["images"])["logits"]
                    for name, value in outputs.items():
                        right[name] += (value.argmax(-1) == batch["labels"]).sum().item()
                if inspected:
                    for name, value in zip(chosen_names, inspected.run(chosen_names, feed), strict=True):
                        shared[name] += _shared_tokens(value, positions[name].numpy(), len(batch["images"]))
            advance()
    if not check.images:
        raise TosaError("not one picture could be read, so the ONNX file is unchecked; give images with --data")
    check.agreement = agreed / check.images
    check.selected = {int(name.removeprefix(CHOSEN)): total / check.images for name, total in shared.items()}
    if labelled:
        seen = ("torch", "onnx") if original is None else ("original", "torch", "onnx")
        check.top1 = {name: right[name] / check.images for name in seen}
    return check


def _largest(found: torch.Tensor, wanted: torch.Tensor) -> float:
    if found.shape != wanted.shape:
        raise TosaError(
            f"the ONNX output has shape {tuple(found.shape)}, torch {tuple(wanted.shape)}: the export is wrong"
        )
    return (found - wanted).abs().max().item()


def _shared_tokens(found: np.ndarray, wanted: np.ndarray, images: int) -> float:
    """Sum over images of the share of chosen positions that are in both; rows may be per image or per head."""
    shares = [len(np.intersect1d(ours, theirs)) / len(theirs) for ours, theirs in zip(found, wanted, strict=True)]
    return float(np.mean(shares)) * images


def _write_facts(model: nn.Module, folder: Path, check: Check, settings: ExportSettings) -> None:
    preprocessing: Preprocessing = origin_of(model).preprocessing
    spec = origin_of(model).spec
    facts = {
        "file": FILE if check.passed else FAILED,
        "status": "passed" if check.passed else "failed",
        "input": {
            "name": "images",
            "shape": ["batch", preprocessing.channels, *preprocessing.size],
            "type": "float32",
            "colour": preprocessing.mode,
            "scaled_to": [0, 1],
        },
        **preprocessing.model_dump(mode="json"),
        "classes": (spec.get("pretrained_cfg") or {}).get("label_names") or spec.get("config", {}).get("id2label"),
        "opset": settings.opset,
        "check": check.to_dict(),
    }
    write_json(folder / FACTS, facts)


@contextlib.contextmanager
def _silence():
    """The exporter prints its steps and warns about its own internals."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
