"""A depth per pixel, in metres: the errors of Eigen et al. (arXiv 1406.2283, section 4) and KITTI's, and their
scale-invariant loss."""

import math
import warnings
from functools import partial

import torch

from tosa_convert.base.errors import TosaWarning, UsageError
from tosa_convert.data.dense import DenseImages, as_large_as, at_truth, has_maps, with_channels
from tosa_convert.models.dense import DenseModel
from tosa_convert.tasks.task import Metric, Task

MAX_DEPTH = 10.0
NEAR = 1e-3
"""Metres: a prediction below is taken for this."""
VARIANCE_FOCUS = 0.85
"""λ of the loss, by BTS (arXiv 1907.10326, section 3.3)."""
SMALLEST, LARGEST = 0.05, 1000.0
"""Metres between which the median depth of images lies, unless their scale is wrong."""
LOOKED_AT = 8
MUCH = 0.05

Error = partial(Metric, higher_is_better=False)
Detail = partial(Error, brief=False)


class Depth(Task):
    """Of heads of ours, and of models of transformers that give metres."""

    metrics = {  # noqa: RUF012
        "abs_rel": Error("Abs Rel"),
        "sq_rel": Detail("Sq Rel"),
        "rmse": Detail("RMSE"),
        "rmse_log": Detail("RMSE log"),
        "log10": Detail("log10"),
        "silog": Detail("SILog"),
        "delta1": Metric("δ<1.25"),
        "delta2": Metric("δ<1.25²", brief=False),
        "delta3": Metric("δ<1.25³", brief=False),
    }
    differences = {"depth_error": Error("depth error")}  # noqa: RUF012
    error_is, unit = "Abs Rel to the original's depth", "m"
    takes_heads, wants = True, "give depth with nyu:, kitti: or depth:"
    png_scale = 256.0

    @classmethod
    def suits(cls, model):
        if isinstance(model, DenseModel):
            return model.config.task == cls.name()
        return is_depth_model(model) and not gives_relative(model)

    @classmethod
    def head(cls, head, channels, max_depth):
        if channels is not None:
            raise UsageError("a depth has no classes; leave --num-classes out")
        if max_depth is not None and not 0 < max_depth < math.inf:
            raise UsageError(f"--max-depth {max_depth:g} is out of range; give metres, such as 10 or 80")
        return super().head(head, channels, MAX_DEPTH if max_depth is None else max_depth)

    def read(self, source, preprocessing, augment=None, seed=0):
        return DenseImages(source, preprocessing, augment, seed)

    def has_labels(self, images, model):
        if not has_maps(images, "depth", self.wants):
            return False
        first = (images.truth(index) for index in range(min(LOOKED_AT, len(images))))
        known = [depth[depth.isfinite()] for depth in first if depth is not None and depth.isfinite().any()]
        if known:
            check_scale(known, images.name)
            warn_of_reach(known, images.name, model)
        return True

    def measure(self, output, labels):
        return per_image(errors, output, labels, tuple(self.metrics))

    def loss(self, output, labels, settings):
        return silog_loss(as_large_as(with_channels(output).float(), labels)[:, 0], labels)

    def difference(self, output, original):
        return {"depth_error": self.error(output, original)}

    def error(self, output, original):
        """Abs Rel to the original's depth, (B,)."""
        ours, theirs = output.flatten(1), original.flatten(1).clamp(min=NEAR)
        return ((ours - theirs).abs() / theirs).mean(1)


def is_depth_model(model: torch.nn.Module) -> bool:
    """Whether it is one of transformers for depth."""
    return any(kind.__name__.endswith("ForDepthEstimation") for kind in type(model).__mro__)


def gives_relative(model: torch.nn.Module) -> bool:
    """Whether what a model of transformers gives is a disparity up to scale and shift: DPT, and Depth-Anything unless
    its configuration says metric."""
    kind = getattr(model.config, "depth_estimation_type", None)
    return kind == "relative" or (kind is None and "DPT" in type(model).__name__)


def per_image(measured, output: torch.Tensor, labels: torch.Tensor, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Each image's map, resampled to the size of its truth, against what is known there; NaN of an image of which
    nothing is.

    Args:
        measured: two rows of numbers, found and true → a value for each of the names.
        output: (B, 1, h, w) or (B, h, w).
        labels: (B, H, W), NaN where nothing is known, see :mod:`tosa_convert.data.dense`.
    """
    rows = []
    for (found,), truth, known in at_truth(output, labels):
        rows.append(measured(found[known], truth[known]) if known.any() else truth.new_full((len(names),), torch.nan))
    return dict(zip(names, torch.stack(rows).unbind(1), strict=True))


def errors(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Metres (N,) both → the metrics of :class:`Depth` in their order; RMSE in metres, SILog in hundredths."""
    found = found.clamp(min=NEAR)
    apart, logs = found - truth, found.log() - truth.log()
    ratio = torch.maximum(found / truth, truth / found)
    return torch.stack(
        [
            (apart.abs() / truth).mean(),
            (apart.square() / truth).mean(),
            apart.square().mean().sqrt(),
            logs.square().mean().sqrt(),
            (found.log10() - truth.log10()).abs().mean(),
            100 * logs.std(correction=0),
            *((ratio < 1.25**power).float().mean() for power in (1, 2, 3)),
        ]
    )


def silog_loss(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """10 · √(mean d² − λ · mean² d) of the differences d of logarithms where the truth is known, of the whole batch
    (BTS, arXiv 1907.10326, section 3.3); 0 where nothing is."""
    known = truth.isfinite() & (truth > 0)
    if not known.any():
        return 0.0 * found.sum()
    logs = found[known].clamp(min=NEAR).log() - truth[known].log()
    # The root of zero has no gradient.
    return 10 * (logs.square().mean() - VARIANCE_FOCUS * logs.mean().square()).clamp(min=1e-12).sqrt()


def warn_of_reach(depths: list[torch.Tensor], name: str, model: torch.nn.Module) -> None:
    """Say so if much of what is known of the first images, metres (N,) each, is further than the head reaches."""
    reach = model.config.max_depth if isinstance(model, DenseModel) else None
    share = 0.0 if reach is None else torch.stack([(depth > reach).float().mean() for depth in depths]).mean().item()
    if share > MUCH:
        message = f"{share:.0%} of the depth of {name} is further than the {reach:g} m that the head reaches"
        warnings.warn(f"{message}; a head with a larger --max-depth would see it", TosaWarning, stacklevel=3)


def check_scale(depths: list[torch.Tensor], name: str) -> None:
    """
    Raises:
        UsageError: the first images are as near, or as far, as no scene is.
    """
    median = torch.stack([depth.median() for depth in depths]).median().item()
    if not SMALLEST <= median <= LARGEST:
        raise UsageError(
            f"the median depth of {name} is {median:.3g} m, as of no scene; give depth in metres, or of PNG "
            "files in depth:ROOT say with --depth-scale what a metre is, such as 1000 or 256"
        )
