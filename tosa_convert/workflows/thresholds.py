"""Thresholds for a share of the multiply–adds that a recipe asks for."""

import warnings
from pathlib import Path

import torch
from torch import nn

from tosa_convert.base.errors import TosaWarning, UsageError
from tosa_convert.base.files import read_json
from tosa_convert.base.progress import Progress
from tosa_convert.config.recipe import Recipe
from tosa_convert.data.sampling import sample
from tosa_convert.measure.macs import flops_on
from tosa_convert.methods.score import Score
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.planning.mean_macs import FEWEST, at_mean, check_differing, check_reachable
from tosa_convert.runs import folder as runs
from tosa_convert.selective.selection import choosing_blocks, keeps_any_number
from tosa_convert.workflows.sources import train_source

IMAGES, MORE = 48, 384
"""That thresholds are moved on and multiply–adds are counted over; more where one choice is made for all layers, as by
a filter before them: there images differ the most in what they keep, and thresholds are moved the fastest."""
WORTH_SAYING = 0.01
"""Of the original's multiply–adds: how far a training may move what images take before it is said."""


def check_thresholds(model: nn.Module, recipe: Recipe) -> None:
    """
    Raises:
        UsageError: a mean is asked of a conversion without thresholds, or one that it cannot come down to, or of too
            few images.
    """
    check_threshold(recipe, keeps_any_number(model))
    if recipe.mean_macs is not None:
        images = counted_images(model, recipe, FEWEST)
        check_differing(images)
        check_reachable(model, images, recipe.mean_macs)


def check_threshold(recipe: Recipe, there: bool) -> None:
    """
    Raises:
        UsageError: a mean is asked of a conversion without thresholds.
    """
    if recipe.mean_macs is not None and not there:
        raise UsageError(
            "a mean of the MACs is for conversions with thresholds, by method spa, method impact or --threshold; leave "
            "--mean-macs out, or take one of them"
        )


def with_mean(model: nn.Module, recipe: Recipe, progress: Progress | None = None) -> nn.Module:
    """The conversion with its thresholds moved to the mean over its images that the recipe asks for; as it was,
    with a warning, where moving them does not get there: what was learnt is worth keeping.
    """
    if recipe.mean_macs is None:
        return model
    try:
        return at_mean(model, counted_images(model, recipe), recipe.mean_macs, progress)
    except UsageError as error:
        warnings.warn(f"thresholds stay where they were: {error}", TosaWarning, stacklevel=2)
        return model


def cost_of(model: nn.Module, recipe: Recipe, progress: Progress | None = None) -> dict:
    """Multiply–adds, where they differ from image to image over as many of the recipe's as thresholds are moved on."""
    if not keeps_any_number(model):
        return flops_on(model)
    return flops_on(model, train_source(recipe), _enough(model), progress)


def warn_of_other_cost(before: dict, after: dict) -> None:
    """Say that the same images take more or less than before a training, which changes what tokens score."""
    was, now = (each["macs"] / after["original"] for each in (before, after))
    if abs(now - was) > WORTH_SAYING:
        warnings.warn(
            f"images of {after['data']} take {now:.3f} of the MACs now, {was:.3f} before the training, which changed "
            "what tokens score; with --mean-macs (mean_macs in a recipe) thresholds are set again after it",
            TosaWarning,
            stacklevel=2,
        )


def on_these_images(model: nn.Module, source: str, data: str | None, progress: Progress | None) -> dict:
    """What these images take, where each keeps as many tokens as it needs; and what those took that it was made on."""
    cost = flops_on(model, data, _enough(model), progress)
    known = read_json(Path(source) / "config.json").get("results") if runs.is_run(source) else None
    before = known["flops"]["macs"] / known["flops"]["original"] if known else None
    return {
        "macs": {name: cost[name] / cost["original"] for name in ("macs", "least", "most")},
        "macs_over": cost["images"],
        "macs_crops": data is None,
        "macs_before": before,
        "macs_learnt": model.tosa_config.part(Score).learns,
    }


def counted_images(model: nn.Module, recipe: Recipe, count: int | None = None) -> torch.Tensor:
    """(B, C, H, W) that thresholds are moved on, on the model's device; fewer where there are fewer."""
    images = sample(train_source(recipe), preprocessing_of(model), count or _enough(model), crops=False)[0]
    return images.to(next(model.parameters()).device)


def _enough(model: nn.Module) -> int:
    return MORE if len(choosing_blocks(model)) == 1 else IMAGES
