"""What can be told of a recipe before its first stage, without its model and its images."""

from tosa_convert.base.errors import UsageError
from tosa_convert.config.recipe import Recipe
from tosa_convert.data.masks import masks_of
from tosa_convert.methods.score import Score
from tosa_convert.runs import folder as runs
from tosa_convert.runs.loading import head_wanted
from tosa_convert.training.distillation import check_teachable
from tosa_convert.training.finetuning import check_settings
from tosa_convert.training.loss import every_loss
from tosa_convert.training.optimisation import check_optimiser
from tosa_convert.workflows.sources import eval_source, train_source
from tosa_convert.workflows.thresholds import check_threshold


def check_recipe(recipe: Recipe) -> None:
    """
    Raises:
        UsageError: its stages cannot do what they are asked for.
    """
    _check_trained(recipe)
    head_wanted(recipe.task, recipe.head, recipe.head_checkpoint, recipe.max_depth, recipe.num_classes)
    train_source(recipe), eval_source(recipe)  # which refuse what does not go with them
    if recipe.distill is not None:
        check_optimiser(recipe.distill)
    if recipe.finetune is not None:
        check_settings(recipe.finetune)
    if masks_of(recipe.data.masks, recipe.data.boxes) is not None and not recipe.convert.part(Score).gates:
        raise UsageError("masks and boxes are for score gate, as in --method spa; leave them out")
    named = recipe.convert.model_fields_set - {"seed"}  # without any it may be that of a run on the hub
    if named and not runs.is_run(recipe.model):  # which has a conversion of its own
        _check_conversion(recipe)


def _check_trained(recipe: Recipe) -> None:
    score = recipe.convert.part(Score)
    if recipe.distill is None and recipe.finetune is None and score.learns:
        raise UsageError(
            f"the recipe trains nothing, and score {recipe.convert.score} has to be trained; add "
            f"{'finetune' if score.learns_in == 'finetune' else 'distill'}:"
        )


def _check_conversion(recipe: Recipe) -> None:
    config, finetune = recipe.convert, recipe.finetune
    check_threshold(recipe, config.threshold is not None)
    if recipe.distill is not None:
        check_teachable(config)
    if finetune is None:
        return
    ratios = config.ratio if isinstance(config.ratio, list) else [config.ratio]
    skips = config.threshold is not None or any(ratio != 1 for ratio in ratios)
    if recipe.distill is None and config.part(Score).distilled() and skips:
        raise UsageError(
            f"score {config.score} would choose at random: add distill: to the recipe, before finetune:, or name a run "
            "as its model"
        )
    for loss in every_loss():
        if getattr(finetune, loss.name(), None):
            loss.fits(config)
