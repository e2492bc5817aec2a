"""Whether a run that is gone on with is the one that was started."""

import hashlib
from pathlib import Path

from tosa_convert.base.errors import UsageError
from tosa_convert.base.files import read_json
from tosa_convert.config.recipe import Recipe, read_recipe
from tosa_convert.runs.folder import SOURCE, is_run
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


def check_same_source(source: Path | None, out: Path, resume: bool) -> dict[str, str]:
    """A run that is trained on is the same one when its training is resumed: its weights are.

    Args:
        source: its folder; None for a model that is no run.

    Returns:
        What is kept in :data:`SOURCE` of the folder until the training is done; nothing of a model that is no run.

    Raises:
        OtherJobError: it was another one.
    """
    if source is None:
        return {}
    with (source / "model.safetensors").open("rb") as file:
        found = {"source": str(source), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    if resume and (out / SOURCE).exists():
        before = read_json(out / SOURCE)
        if before.get("sha256") != found["sha256"]:
            raise OtherJobError(
                f"{out} was started from {before.get('source')} with other weights than {source} has now; resume it "
                "from the same, or start a new run with another --out"
            )
    return found


def check_stage(out: Path, stage: str) -> None:
    """
    Raises:
        OtherJobError: a finished run of another stage is to be gone on with.
    """
    done = read_json(out / "config.json").get("stage")
    if done not in (None, stage):
        raise OtherJobError(f"{out} is a finished {done} run; give {stage} a folder of its own with --out")


def _flatten(content: dict, before: str = "") -> dict:
    """Nested dictionaries as one, with dotted keys."""
    flat = {}
    for key, value in content.items():
        name = f"{before}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
