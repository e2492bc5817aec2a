"""Whether a run that is gone on with is the one that was started."""

from pathlib import Path

from tosa_convert.base.errors import UsageError
from tosa_convert.config.recipe import Recipe, read_recipe
from tosa_convert.runs.folder import is_run
from tosa_convert.training.impact import FILE as IMPACT

AFTERWARDS = ("convert.rho", "convert.kept")
"""What decides over token impact once it is worked out, so that it may be another when a run is resumed."""
MEASURED = ("data.eval", "export")
"""Keys of what comes after a training, and may be mended before it is gone on with."""
TRAININGS = ("distill", "finetune")
"""Stages with settings of their own."""


class OtherJobError(UsageError):
    """A run is to be gone on with by other settings than its own."""


def check_same_job(recipe: Recipe, path: Path, stage: str) -> None:
    """A stage is resumed with the settings it was started with, or its result would belong to neither job. Those of
    another stage, which is checked on its own, may have been mended."""
    if not path.exists():
        return
    ours, theirs = (_flatten(each.model_dump(mode="json")) for each in (recipe, read_recipe(path)))
    others = [each for each in TRAININGS if each != stage]
    undecided = (path.parent / IMPACT).exists() and not is_run(path.parent)
    afterwards = AFTERWARDS if undecided else ()
    counted = recipe.convert.threshold is not None  # over the training images
    measured = (*MEASURED, "data") if stage == "convert" and not counted else MEASURED
    changed = [
        key
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
        and not key.startswith(measured)
        and key not in afterwards
        and key.split(".")[0] not in others
    ]
    if changed:
        raise OtherJobError(
            f"{path.parent} was started with other settings ({', '.join(changed[:4])}); resume it with the same "
            "command, or start a new run with another --out"
        )


def _flatten(content: dict, before: str = "") -> dict:
    """Nested dictionaries as one, with dotted keys."""
    flat = {}
    for key, value in content.items():
        name = f"{before}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
