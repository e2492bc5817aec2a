"""Whether a run whose model is trained on is the one that a recipe is about."""

from pathlib import Path
from typing import Any

from torch import nn

from tosa_convert.base.errors import UsageError
from tosa_convert.config.conversion import ConvertConfig
from tosa_convert.config.recipe import Recipe
from tosa_convert.models.dense import DenseModel
from tosa_convert.models.outputs import outputs_of
from tosa_convert.runs.loading import head_wanted
from tosa_convert.selective.conversion import convert, is_converted, original
from tosa_convert.workflows.same_job import AFTERWARDS

MOVED = ("seed", "method", "threshold", *(name.removeprefix("convert.") for name in AFTERWARDS))
"""What of a conversion names it only, or may have been changed by the training."""


def check_same_model(source: str, model: Any, recipe: Recipe) -> None:
    """What a recipe says of its model has to hold of the run that is trained on: a recipe's later stages have the model
    of its earlier ones.

    Raises:
        UsageError: it asks for other weights, another head or another conversion.
    """
    way_out = f"leave it out, or name what {source} was made from in place of the run"
    for kind in ("checkpoint", "head_checkpoint"):
        asked, own = getattr(recipe, kind), getattr(model.tosa_origin, kind)
        if asked is not None and (own is None or Path(asked).name != Path(own).name):  # which may have been moved
            raise UsageError(f"the weights of a run are its own, and {source} was not made from {asked}; {way_out}")
    _check_head(source, model, recipe, way_out)
    if is_converted(model):
        own, asked, unasked = (
            each.model_dump(exclude={"seed"}) for each in (model.tosa_config, recipe.convert, ConvertConfig())
        )
        if asked not in (own, unasked):
            _check_conversion(source, model, recipe)


def _check_head(source: str, model: Any, recipe: Recipe, way_out: str) -> None:
    wanted = head_wanted(recipe.task, recipe.head, recipe.head_checkpoint, recipe.max_depth, recipe.num_classes)
    if wanted is not None and not (isinstance(model, DenseModel) and model.config == wanted):
        raise UsageError(f"the head of a run is fixed, and that of {source} is another than asked for; {way_out}")
    classes, has = recipe.num_classes, outputs_of(model)
    if wanted is None and classes not in (None, has, model.tosa_origin.num_classes):
        raise UsageError(
            f"the head of a run is fixed, and that of {source} has {has} outputs, not {classes}; {way_out}"
        )


def _check_conversion(source: str, model: nn.Module, recipe: Recipe) -> None:
    asked = convert(original(model), recipe.convert).tosa_config.model_dump()
    own = model.tosa_config.model_dump()
    odd = [name for name in asked if name not in MOVED and asked[name] != own.get(name)]
    if odd:
        raise UsageError(
            f"{source} is a run that was converted otherwise ({', '.join(odd)}); leave convert out of the recipe, or "
            "name what the run was made from"
        )
