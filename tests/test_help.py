"""What --help says of defaults is what happens."""

import pytest
import typer.main
from pydantic import BaseModel

from tosa_convert import BenchSettings, Bypass, ConvertConfig, DistillSettings, ExportSettings, FinetuneSettings
from tosa_convert.cli.main import app
from tosa_convert.config.recipe import Recipe
from tosa_convert.data.readers.depth import MILLIMETRES
from tosa_convert.methods.method import published
from tosa_convert.methods.parts import every
from tosa_convert.methods.schedule import Schedule
from tosa_convert.methods.score import Score
from tosa_convert.planning import plan as planning
from tosa_convert.runs.loading import LIGHT
from tosa_convert.tasks.depth import MAX_DEPTH

COMMANDS = typer.main.get_command(app).commands
SETTINGS = {"distill": DistillSettings, "finetune": FinetuneSettings, "export": ExportSettings, "bench": BenchSettings}
DESCRIBED = {
    "--data": [
        "built-in photos",
        "noise; built-in photos where it has to be images",
        "built-in photos, where it has to be images",
    ],
    "--calibration": ["found in each image"],
    "--image": ["built-in photos"],
    "--images": ["built-in photos"],
    "--out": ["runs/…", "the run", "report.html in the run"],
    "--img-size": ["the model's"],
    "--num-classes": ["the model's"],
    "--lr": ["the stage's"],
    "--layers": ["the schedule's"],
    "--keep": ["logits of a classifier, the map of a dense head, otherwise patches"],
    "--task": ["the model's own head"],
    "--head-checkpoint": ["untrained"],
    "--format": ["npy"],
    "--segment": ["1, or searched for --by latency"],
    "--device": ["a GPU if there is one"],
    "--labels": ["1 with labels"],
    "--logits": ["1 without labels"],
    "--features": ["1 without labels"],
    "--maps": ["1 without labels"],
    "--cut": ["1 with method idle"],
    "--consistency": ["1 with method mctf"],
    "--precision": ["float32, and bfloat16 on a GPU"],
    "--hidden": ["2 per head"],
    "--r": ["by --ratio"],
    "--rho": ["by --kept"],
    "--kept": ["0.5"],
    "--gates": ["0.01 with method spa"],
    "--masks": ["the original's attention"],
}
"""Defaults that depend on something else; what they come to is tested with the commands."""


def defaults_of(command: str) -> dict[str, object]:
    """Option → what holds where it is not given, by the objects that do the work."""
    config = ConvertConfig()
    others = [part().options.model_dump() for kind in (Score, Bypass, Schedule) for part in every(kind).values()]
    parts = [*others, *(config.make(kind).options.model_dump() for kind in (Score, Bypass, Schedule))]
    own: BaseModel | None = SETTINGS[command]() if command in SETTINGS else None
    known = {"seed": Recipe(model="any").seed, "budget": planning.BUDGET, "method": "tosa", "head": LIGHT}
    known |= {"max_depth": f"{MAX_DEPTH:g}", "depth_scale": f"{MILLIMETRES:g}"}
    for values in (config.model_dump(exclude={"method"}), *parts, own.model_dump() if own else {}):
        known |= values
    return {**known, "steps": own.total_steps(1, 1)} if "steps" in known else known


@pytest.mark.parametrize(
    ("command", "option"),
    [
        pytest.param(command, option, id=f"{command} {option.opts[0]}")
        for command, found in COMMANDS.items()
        for option in found.params
        if isinstance(getattr(option, "show_default", None), str)
    ],
)
def test_a_default_in_words_is_the_real_one(command, option):
    real = defaults_of(command).get(option.name) if option.default is None else option.default
    if option.show_default not in DESCRIBED.get(option.opts[0], []):
        assert option.show_default == str(real)


def test_a_conversion_with_nothing_given_is_tosa():
    parts = ConvertConfig().model_dump()
    assert {kind: parts[kind] for kind in ("score", "bypass", "schedule")} == published()["tosa"].parts


@pytest.mark.parametrize("command", ["export", "bench"])
def test_a_default_that_is_typed_out_is_that_of_the_settings(command):
    known = SETTINGS[command]().model_dump()
    seen = [option for option in COMMANDS[command].params if known.get(option.name) is not None]
    assert seen
    for option in seen:
        wanted = known[option.name]
        assert option.default == (",".join(map(str, wanted)) if isinstance(wanted, list) else wanted), option.name
