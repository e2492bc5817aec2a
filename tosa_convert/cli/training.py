"""The commands that train: distill, finetune, and run, which takes a whole recipe through."""

from pathlib import Path
from typing import Annotated

import typer

from tosa_convert.base.errors import UsageError
from tosa_convert.cli.conversion import takes_conversion
from tosa_convert.cli.dense import takes_head, takes_maps
from tosa_convert.cli.options import (
    AugmentOption,
    BatchSize,
    Checkpoint,
    DataOption,
    Device,
    Epochs,
    ImgSize,
    Json,
    Lr,
    MeanMacs,
    Model,
    NumClasses,
    Out,
    PrecisionOption,
    RecipeOption,
    Resume,
    Seed,
    Source,
    Steps,
    Workers,
    is_converted_run,
    make_recipe,
    out_folder,
    pick_source,
    stem,
)
from tosa_convert.cli.output import bar, failures_shown, print_json, say, say_data, show
from tosa_convert.cli.parsing import at_least


@takes_conversion
@takes_head
@takes_maps
def distill(
    model: Model = None,
    conversion: dict | None = None,
    data: DataOption = None,
    map_options: dict | None = None,
    recipe: RecipeOption = None,
    out: Out = None,
    new_head: dict | None = None,
    checkpoint: Checkpoint = None,
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    steps: Steps = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Lr = None,
    augment: AugmentOption = None,
    precision: PrecisionOption = None,
    workers: Workers = None,
    mean_macs: MeanMacs = None,
    seed: Seed = None,
    examples: Annotated[
        int | None,
        typer.Option(help="images to work out token impact on", show_default="256", callback=at_least(1)),
    ] = None,
    device: Device = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Convert a model and train its selectors by distillation from the original model. Needs no labels."""
    from tosa_convert.workflows import pipeline as stages

    plan = make_recipe(recipe, "distill", locals())
    folder = out_folder(out, stem(plan.model), resume, device)
    results = stages.distill_stage(plan, folder, resume=resume, device=device, progress=bar(as_json))
    say_data(plan)
    show(results, "training_table", as_json)


@takes_conversion
@takes_head
@takes_maps
def finetune(
    run: Source = None,
    data: DataOption = None,
    map_options: dict | None = None,
    recipe: RecipeOption = None,
    out: Out = None,
    conversion: dict | None = None,
    new_head: dict | None = None,
    checkpoint: Checkpoint = None,
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    steps: Steps = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Lr = None,
    labels: Annotated[
        float | None, typer.Option(help="weight of the loss on labels", show_default="1 with labels")
    ] = None,
    logits: Annotated[
        float | None,
        typer.Option(help="weight of the loss on the original's logits", show_default="1 without labels"),
    ] = None,
    features: Annotated[
        float | None,
        typer.Option(help="weight of the loss on the original's tokens", show_default="1 without labels"),
    ] = None,
    maps: Annotated[
        float | None,
        typer.Option(help="weight of the loss on the original's maps", show_default="1 without labels"),
    ] = None,
    head_only: Annotated[
        bool | None, typer.Option("--head-only", help="train the new head alone", show_default=False)
    ] = None,
    cut: Annotated[
        float | None, typer.Option(help="weight of the token cut loss", show_default="1 with method idle")
    ] = None,
    consistency: Annotated[
        float | None, typer.Option(help="weight of mctf's second pass", show_default="1 with method mctf")
    ] = None,
    gates: Annotated[
        float | None,
        typer.Option(help="weight of spa's loss on selection labels", show_default="0.01 with method spa"),
    ] = None,
    masks: Annotated[
        str | None,
        typer.Option(
            help="selection labels: a folder of PNG masks named like the images",
            show_default="the original's attention",
        ),
    ] = None,
    boxes: Annotated[
        str | None, typer.Option(help="selection labels: boxes in a COCO file", show_default=False)
    ] = None,
    teacher: Annotated[bool, typer.Option("--teacher", help="learn from the original alone, without labels")] = False,
    augment: AugmentOption = None,
    precision: PrecisionOption = None,
    workers: Workers = None,
    mean_macs: MeanMacs = None,
    seed: Seed = None,
    device: Device = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train a run's model to work with its layers selective. The result is a new run.

    A model that is not a run is converted first, by --method tome, --score random and so on. With --ratio 1 it is
    trained as it is, such as under a new head (--task depth), and the run can be planned and compared.
    """
    from tosa_convert.config.recipe import find_recipe, read_recipe
    from tosa_convert.workflows import pipeline as stages
    from tosa_convert.workflows.sources import refuse_options_of_a_run

    if teacher and labels:
        raise UsageError("--teacher learns without labels, and --labels gives them a weight; leave out one of the two")
    labels = 0.0 if teacher else labels
    source = pick_source(run if run or not recipe else read_recipe(find_recipe(recipe)).model)
    trained = is_converted_run(source)
    refuse_options_of_a_run(trained, conversion)
    known = Path(source) / "recipe.yaml" if trained else None
    own = read_recipe(known) if known and known.exists() else None  # a run saved from Python has none
    options = {**locals(), "model": own.model if own else source}
    plan = make_recipe(recipe or (str(known) if own else None), "finetune", options)
    if own and own.finetune and not recipe:
        say(f"goes on with the settings of {source}; --steps, --labels and so on are laid over them")
    folder = out_folder(out, f"{stem(source)}-finetuned", resume, device)
    results = stages.finetune_stage(source, plan, folder, resume=resume, device=device, progress=bar(as_json))
    say_data(plan)
    show(results, "training_table", as_json)


def run(
    recipe: Annotated[str, typer.Argument(help="a recipe file, or the name of a built-in one")],
    out: Out = None,
    seed: Seed = None,
    device: Device = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Run all stages of a recipe."""
    from tosa_convert.base import distributed as processes
    from tosa_convert.config.recipe import Recipe, find_recipe, read_recipe
    from tosa_convert.config.validation import build
    from tosa_convert.workflows import pipeline as stages

    path = find_recipe(recipe)
    plan = read_recipe(path)
    if seed is not None:
        plan = build(Recipe, {**plan.model_dump(exclude_unset=True), "seed": seed})
    folder = out_folder(out, path.stem, resume, device)

    def report(stage: str, results: dict) -> None:
        tables = {"convert": "convert_table", "export": "export_table", "eval": "eval_table"}
        if not as_json:
            show(results, tables.get(stage, "training_table"), False)

    with failures_shown(as_json):
        results = stages.run_recipe(plan, folder, resume=resume, device=device, progress=bar(as_json), report=report)
    if as_json and processes.is_main():
        print_json(results)
