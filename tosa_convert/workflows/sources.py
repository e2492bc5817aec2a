"""What a command works on: its model, its training images and those for evaluation."""

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from tosa_convert.base.errors import TosaWarning, UsageError
from tosa_convert.config.recipe import Recipe
from tosa_convert.data.reader import read, takes, with_options
from tosa_convert.methods.score import Score
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.runs import folder as runs
from tosa_convert.runs.loading import load
from tosa_convert.selective.conversion import convert, is_converted, is_whole
from tosa_convert.selective.selection import keeps_any_number
from tosa_convert.tasks.task import task_of
from tosa_convert.workflows.same_model import check_same_model


def train_source(recipe: Recipe) -> str | None:
    """The training images, with what is given beside them."""
    return _beside(recipe, recipe.data.train, recipe.data.list)


def eval_source(recipe: Recipe) -> str | None:
    """The images for evaluation, with what is given beside them; None where there are none of their own."""
    if recipe.data.eval is None:
        return None
    return _beside(recipe, recipe.data.eval, recipe.data.eval_list)


def _beside(recipe: Recipe, source: str | None, listed: str | None) -> str | None:
    """A depth scale is for those that take one, where one of the two does."""
    another = any(takes(each, "scale") for each in (recipe.data.train, recipe.data.eval))
    scale = recipe.data.depth_scale if takes(source, "scale") or not another else None
    return with_options(source, list=listed, scale=scale)


def converted(recipe: Recipe) -> nn.Module:
    """A recipe's model, under its head and converted."""
    how = {"checkpoint": recipe.checkpoint, "img_size": recipe.img_size, "num_classes": recipe.num_classes}
    head = {name: getattr(recipe, name) for name in ("task", "head", "head_checkpoint", "max_depth")}
    return convert(load(recipe.model, **how, **head), recipe.convert)


def to_finetune(source: str, run: Path | None, recipe: Recipe) -> tuple[nn.Module, bool]:
    """The model of a run, with its head and its conversion, or the recipe's; and whether it was converted here.

    Args:
        run: the folder of the run that ``source`` names; None where it names none.

    Raises:
        UsageError: the recipe asks for another model, head or conversion than the run has.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* is new and untrained", TosaWarning)  # which it is here to be
        if run is None:
            return converted(recipe), True
        model = load(run, img_size=recipe.img_size)
    check_same_model(source, model, recipe)
    fresh = not is_converted(model)
    return convert(model, recipe.convert) if fresh else model, fresh


def loaded_or_converted(source: str, options: dict, **how: Any) -> nn.Module:
    """A run's model, or a model converted with the options that were given; ``how`` it is loaded."""
    model = load(source, **how)
    refuse_options_of_a_run(is_converted(model), options)
    return convert(model, **options) if options else model


def to_measure(source: str, options: dict, **how: Any) -> nn.Module:
    """The same for its cost: with random weights, unless the number of tokens depends on them."""
    model = loaded_or_converted(source, options, pretrained=False, **how)
    if keeps_any_number(model) and not runs.is_run(source):
        if options:
            say_if_by_chance(model, source)
        return loaded_or_converted(source, options, **how)
    return model


def say_if_by_chance(model: nn.Module, source: str) -> None:
    """Of a conversion that was just made, and that has something to learn."""
    score = model.tosa_config.part(Score)
    if score.learns and not is_whole(model):
        verb = "distill" if score.distilled() else "finetune"
        warnings.warn(
            f"score {score.name()} has learnt nothing yet, so tokens are chosen by chance; {verb} {source} first, and "
            "take that run",
            TosaWarning,
            stacklevel=2,
        )


def refuse_options_of_a_run(converted: bool, options: dict) -> None:
    if converted and options:
        raise UsageError("the conversion options of a run are fixed; leave them out, or name the original model")


def check_measured(recipe: Recipe) -> None:
    """What is read after training is opened before it.

    Raises:
        UsageError: it cannot be, or an export is to be checked on a stream.
    """
    measured = eval_source(recipe) or (recipe.export and train_source(recipe))
    if measured:
        reader = read(measured)
        if recipe.export:
            reader.check_stored()


def check_labels(model: nn.Module, recipe: Recipe) -> None:
    """The labels of what is read after training are looked at before it.

    Raises:
        UsageError: they do not fit the model's head.
    """
    measured, task = eval_source(recipe), task_of(model)
    looked_at = {measured: "data.eval_labels"} if measured and recipe.data.eval_labels else {}
    if recipe.export and recipe.export.labels and (exported := measured or train_source(recipe)):
        looked_at.setdefault(exported, "export.labels")
    for source, key in looked_at.items():
        try:
            task.has_labels(task.read(source, preprocessing_of(model)), model)
        except UsageError as error:
            raise UsageError(f"{error}; where its sub-folders are no classes, set {key} to false") from None
