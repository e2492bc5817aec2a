"""An ONNX file in ONNX Runtime, beside the torch model that it was made of."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from tosa_convert.base.errors import TosaError
from tosa_convert.base.progress import Progress
from tosa_convert.config.settings import ExportSettings
from tosa_convert.data.images import Images, loader
from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.models.outputs import agreement, predict
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.selective.selection import keeps_any_number, last_choices
from tosa_convert.tasks.task import Task

CHOSEN = "chosen_"
"""How the chosen tokens of a layer are called in the graph."""


@dataclass
class Check:
    """ONNX Runtime against torch on real images.

    Attributes:
        images: how many images.
        broken: names of those that could not be read.
        difference: largest absolute difference of an output.
        agreement: share of images with the same top-1 (models without a head: of close tokens).
        selected: per selective layer, share of the chosen tokens that both chose.
        metrics: with labels, each of the task's (such as "top1") of "original", "torch" and "onnx".
        sizes: the image sizes (H, W) that were checked.
        threshold: the agreement that was asked for.
    """

    images: int = 0
    broken: list[str] = field(default_factory=list)
    difference: float = 0.0
    agreement: float = 0.0
    selected: dict[int, float] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    threshold: float = 0.99

    @property
    def passed(self) -> bool:
        return self.images > 0 and self.agreement >= self.threshold and math.isfinite(self.difference)

    def to_dict(self) -> dict:
        plain = asdict(self)
        return {**plain, **plain.pop("metrics"), "passed": self.passed}


def other_sizes(model: nn.Module) -> list[tuple[int, int]]:
    """Image sizes (H, W) that are not the model's own: a larger one, and one with a quarter fewer rows of patches."""
    (height, width), adapter = preprocessing_of(model).size, adapter_of(model)
    down, across = adapter.patch
    fewer = down * (height // down // 4)
    if adapter.square:
        return [(height + 2 * down,) * 2, (height - fewer,) * 2]
    return [(height + 2 * down, width + across), (height - fewer, width)]


def check_file(
    model: nn.Module,
    path: Path,
    images: Images,
    task: Task | None,
    settings: ExportSettings,
    original: nn.Module | None,
    progress: Progress,
) -> Check:
    """Run the file and the model it was made of on the same images.

    Args:
        task: what is measured with their labels; None where there are none.
    """
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    graph, chosen_names = _with_chosen(path)
    inspected = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"]) if chosen_names else None
    check, agreed, labelled = Check(threshold=settings.threshold), 0.0, 0
    shared = dict.fromkeys(chosen_names, 0.0)
    # Spread over the folder, so that every class is seen.
    images = torch.utils.data.Subset(images, range(0, len(images), -(-len(images) // settings.images)))
    at_once = 1 if keeps_any_number(model) else 8
    batches = loader(images, batch_size=at_once)
    with progress.track("check in ONNX Runtime", len(batches), unit="images", per_step=at_once) as advance:
        for batch in batches:
            check.broken += batch["broken"]
            if len(batch["images"]):
                feed = {"images": batch["images"].numpy()}
                with torch.inference_mode():
                    wanted = run(model, batch["images"])
                positions = {f"{CHOSEN}{layer}": choice.attended for layer, choice in last_choices(model).items()}
                found = _outputs(session, batch["images"])
                check.images += len(batch["images"])
                check.difference = max([check.difference, *map(_largest, found, wanted.values())])
                kind, main = next(iter(wanted.items()))
                agreed += agreement(kind, found[0], main).sum().item()
                if task is not None:
                    outputs = {"torch": main, "onnx": found[0]}
                    if original is not None:
                        outputs["original"] = predict(original, batch["images"])[1]
                    known = task.known(batch["labels"])
                    labelled += int(known.sum())
                    for name, value in outputs.items():
                        for metric, values in task.measure(value, batch["labels"]).items():
                            sums = check.metrics.setdefault(metric, {})
                            sums[name] = sums.get(name, 0.0) + values[known].sum().item()
                if inspected:
                    for name, value in zip(chosen_names, inspected.run(chosen_names, feed), strict=True):
                        shared[name] += _shared_tokens(value, positions[name].numpy(), len(batch["images"]))
            advance()
    if not check.images:
        raise TosaError("not one image could be read, so the ONNX file is unchecked; give images with --data")
    check.agreement = agreed / check.images
    check.sizes = [preprocessing_of(model).size]
    if settings.any_size:
        _check_other_sizes(model, session, check)
    check.selected = {int(name.removeprefix(CHOSEN)): total / check.images for name, total in shared.items()}
    check.metrics = {
        metric: {name: total / max(1, labelled) for name, total in sums.items()}
        for metric, sums in check.metrics.items()
    }
    return check


def _outputs(session: onnxruntime.InferenceSession, images: torch.Tensor) -> list[torch.Tensor]:
    try:
        return [torch.from_numpy(value) for value in session.run(None, {"images": images.numpy()})]
    except Exception as error:
        height, width = images.shape[-2:]
        raise TosaError(
            f"ONNX Runtime cannot run the file at {height}×{width}: {' '.join(str(error).split())[:150]}; if it was "
            "exported with --any-size, this model does not support that; leave it out"
        ) from error


@torch.inference_mode()
def _check_other_sizes(model: nn.Module, session: onnxruntime.InferenceSession, check: Check) -> None:
    """The built-in photos, larger and smaller than the model has them, one by one; the worst agreement counts."""
    for size in other_sizes(model):
        images = Images(None, preprocessing_of(model).at(size))
        agreed = []
        for index in range(len(images)):
            image = images[index][0][None]
            wanted = run(model, image)
            found = _outputs(session, image)
            check.difference = max([check.difference, *map(_largest, found, wanted.values())])
            kind, main = next(iter(wanted.items()))
            agreed.append(agreement(kind, found[0], main).mean().item())
        check.agreement = min(check.agreement, sum(agreed) / len(agreed))
        check.sizes.append(size)


def _with_chosen(path: Path) -> tuple[bytes, list[str]]:
    """The file's graph with the chosen tokens as outputs again, for the check."""
    proto = onnx.load(path)
    names = [name for node in proto.graph.node for name in node.output if name.startswith(CHOSEN)]
    for name in names:
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None))
    return proto.SerializeToString(), names


def _largest(found: torch.Tensor, wanted: torch.Tensor) -> float:
    if found.shape != wanted.shape:
        raise TosaError(
            f"the ONNX output has shape {tuple(found.shape)}, torch {tuple(wanted.shape)}: a size is fixed in the "
            "file; if it was exported with --any-size, this model does not support that; leave it out"
        )
    difference = (found - wanted).abs().max().item()
    return difference if math.isfinite(difference) else math.inf


def _shared_tokens(found: np.ndarray, wanted: np.ndarray, images: int) -> float:
    """Sum over images of the share of chosen positions that are in both; rows may be per image or per head."""
    shares = [
        len(np.intersect1d(ours, theirs)) / max(len(ours), len(theirs))
        for ours, theirs in zip(found, wanted, strict=True)
    ]
    return float(np.mean(shares)) * images
