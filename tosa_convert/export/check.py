"""What the check of an exported file says."""

import math
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from tosa_convert.config.settings import ExportSettings
from tosa_convert.models.adapter import adapter_of
from tosa_convert.models.outputs import EMBEDDING, agreement
from tosa_convert.tasks.task import Task

COSINES = ("patch", "class", "cosine")


@dataclass
class Check:
    """ONNX Runtime against torch on real images.

    Attributes:
        precision: of the file.
        images: how many images.
        broken: names of those that could not be read.
        difference: largest absolute difference of an output.
        agreement: share of images with the same top-1 (models without a head: of close tokens).
        figures: how near it is to the torch model that it was made of, see :func:`closeness`; means over images.
        bounds: of a file with fewer bits, what each of these figures has to reach, or "error" to stay below.
        selected: per selective layer, share of the chosen tokens that both chose.
        metrics: with labels, each of the task's (such as "top1") of "original", "torch" and "onnx".
        sizes: the image sizes (H, W) that were checked.
        threshold: the agreement that was asked for, of a file in float32.
        left: operators of an INT8 file that stayed in float.
        chain: of a file with fewer bits, the models from the original to it, see :mod:`tosa_convert.export.chain`.
        tried: of precision auto, what became of each that was tried.
        elsewhere: of the other runtime that was asked for, "runtime", "images", "figures", "bounds", and the
            milliseconds "ms" and, in ONNX Runtime, "ms_onnx" for one image, in turn.
    """

    precision: str = "float32"
    images: int = 0
    broken: list[str] = field(default_factory=list)
    difference: float = 0.0
    agreement: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)
    selected: dict[int, float] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    threshold: float = 0.99
    left: list[str] = field(default_factory=list)
    chain: list[dict] = field(default_factory=list)
    tried: dict[str, str] = field(default_factory=dict)
    elsewhere: dict = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        near = margin(self.figures, self.bounds) >= 0 if self.bounds else self.agreement >= self.threshold
        near &= not self.elsewhere or margin(self.elsewhere["figures"], self.elsewhere["bounds"]) >= 0
        return self.images > 0 and near and math.isfinite(self.difference)

    def to_dict(self) -> dict:
        plain = asdict(self)
        return {**plain, **plain.pop("metrics"), "passed": self.passed}


def closeness(
    model: nn.Module, task: Task, kind: str, found: torch.Tensor, wanted: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Per image, (B,), how near an output is to another of the same kind: of tokens the cosines "patch" (their mean)
    and "class", of an embedding "cosine", of maps the differences of the task and its "error", and of anything else
    "agreement", see :func:`tosa_convert.models.outputs.agreement`."""
    if kind == "tokens":
        adapter, cosines = adapter_of(model), F.cosine_similarity(found, wanted, dim=-1)
        apart = {"class": cosines[:, 0]} if adapter.class_token else {}
        return {"patch": cosines[:, adapter.prefix :].mean(1), **apart}
    if kind == EMBEDDING:
        return {"cosine": F.cosine_similarity(found, wanted, dim=-1)}
    if task.differences:
        return {**task.difference(found, wanted), "error": task.error(found, wanted)}
    return {"agreement": agreement(kind, found, wanted)}


def bounds(names: list[str], settings: ExportSettings) -> dict[str, float]:
    """What a file with fewer bits has to reach of these figures, as the settings say."""
    every = {
        **dict.fromkeys(COSINES, settings.min_cosine),
        "agreement": settings.min_agreement,
        "error": settings.max_error,
    }
    return {name: every[name] for name in names if name in every}


def margin(figures: dict[str, float], bounds: dict[str, float]) -> float:
    """By how much the worst of them is within its bound; below 0 if it is not, or not a number."""
    each = [bound - figures[name] if name == "error" else figures[name] - bound for name, bound in bounds.items()]
    return min(value if math.isfinite(value) else -math.inf for value in each)
