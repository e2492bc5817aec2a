import shutil

import pytest
import yaml

from tosa_convert import ConvertConfig, UsageError, load
from tosa_convert.config.options import over
from tosa_convert.config.recipe import Recipe, find_recipe, read_recipe, recipes_folder
from tosa_convert.config.validation import build
from tosa_convert.workflows.recipe_checks import check_recipe
from tosa_convert.workflows.sources import eval_source, train_source


def written(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(recipes_folder().glob("*.yaml")), ids=lambda path: path.stem)
def test_our_recipes_are_valid_and_say_how_to_run_them(path):
    recipe = read_recipe(path)
    assert recipe.distill is not None or recipe.convert.score != "attention"
    assert "tosa-convert" in path.read_text().split("model:")[0]


def test_the_recipes_the_issue_asks_for_are_there():
    names = {path.stem for path in recipes_folder().glob("*.yaml")}
    assert {"quickstart", "deit_tiny_imagenet", "dinov2_small_518"} <= names


def test_everything_wrong_is_reported_at_once_with_lines(tmp_path):
    text = "model: x\nconvert:\n  layrs: [2]\n  ratio: 1.5\ndistil: {}\n"
    text += "distill:\n  steps: many\n  lr: -1\n  kl: sideways\n"
    with pytest.raises(UsageError) as caught:
        read_recipe(written(tmp_path, text))
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 6
    for line, (number, words) in zip(
        lines,
        [
            (3, "convert.layrs: unknown key; did you mean 'layers'?"),
            (4, "convert.ratio: 1.5 is out of range"),
            (5, "distil: unknown key; did you mean 'distill'?"),
            (7, "distill.steps"),
            (8, "distill.lr"),
            (9, "distill.kl"),
        ],
        strict=True,
    ):
        assert f"line {number}: " in line
        assert words in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "line 1: not valid YAML"),
        ("- a\n- b\n", "is not a recipe"),
        ("", "is not a recipe"),
        ("convert: {}\n", "model: Field required"),
        ("model: a\ndata: {train.: b}\n", "data.train.: unknown key; did you mean 'train'?"),
        ("model: a\nmodel: b\n", "line 2: model: is given twice"),
        ("model: a\nfinetune: {masks: m}\n", "finetune.masks: unknown key; it belongs under data:"),
        ("model: a\nfinetune: {mean_macs: 0.7}\n", "finetune.mean_macs: unknown key; it belongs at the top"),
        ("model: a\nconvert: {layers: [1]}\n", "layer 1 cannot be selective"),
        ("model: a\nconvert: {layers: [2, 3]}\n", "neighbours"),
        ("model: a\nimg_size: big\n", "img_size"),
        ("model: a\nimg_size: [28]\n", "img_size"),
        ("model: a\nfinetune: {scale: [0.5]}\n", "finetune.scale"),
        ("model: a\ndistill: {epochs: .inf}\n", "distill.epochs: Input should be a finite number"),
        ("model: a\ndistill: {lr: 5e-3}\n", "YAML takes 5e-3 for text; write it with a decimal point"),
        ("model: a\ndata: {eval_list: x.txt}\n", "eval_list is for the images of eval:"),
        ("model: a\ndata: {eval_labels: false}\n", "eval_labels: false is for the images of eval:"),
        ("model: &a {b: *a}\n", "refers to itself"),
    ],
)
def test_single_mistakes_are_named(text, message, tmp_path):
    with pytest.raises(UsageError, match=message.replace("[", r"\[")) as caught:
        read_recipe(written(tmp_path, text))
    assert "recipe.yaml" in str(caught.value)


def test_a_stage_without_settings_runs_with_defaults(tmp_path):
    recipe = read_recipe(written(tmp_path, "model: a\ndistill:\nexport:\n"))
    assert recipe.distill.batch_size == 8
    assert recipe.export.threshold == 0.99
    assert recipe.finetune is None


@pytest.mark.parametrize("name", sorted(path.stem for path in recipes_folder().glob("*.yaml")))
def test_a_resolved_recipe_reads_back_the_same_and_names_no_nothing(name, tmp_path):
    recipe = read_recipe(find_recipe(name))
    text = recipe.to_yaml()
    assert read_recipe(written(tmp_path, text)) == recipe
    assert "null" not in text
    if recipe.distill is not None:
        assert yaml.safe_load(text)["distill"]["lr"] == recipe.distill.lr


def test_recipes_cannot_name_python_objects(tmp_path):
    with pytest.raises(UsageError, match="not valid YAML"):
        read_recipe(written(tmp_path, "model: !!python/object/apply:os.system ['true']\n"))


def test_a_depth_scale_is_of_the_training_images_where_there_are_no_others():
    recipe = Recipe(model="any", data={"train": "depth:ROOT", "depth_scale": 256.0})
    assert (train_source(recipe), eval_source(recipe)) == ("depth:ROOT?scale=256.0", None)
    both = recipe.model_copy(update={"data": recipe.data.model_copy(update={"eval": "depth:OTHER"})})
    assert eval_source(both) == "depth:OTHER?scale=256.0"
    for train, measured in (("photos", "depth:ROOT"), ("depth:ROOT", "masks:OTHER")):
        data = recipe.data.model_copy(update={"train": train, "eval": measured})
        found = [of(recipe.model_copy(update={"data": data})) for of in (train_source, eval_source)]
        assert found == [each + "?scale=256.0" * each.startswith("depth") for each in (train, measured)]
    with pytest.raises(UsageError, match="--depth-scale goes with sources of maps"):
        train_source(Recipe(model="any", data={"train": "photos", "depth_scale": 256.0}))


def test_unknown_recipes_name_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'quickstart'"):
        find_recipe("quickstrat")


@pytest.mark.parametrize("name", ["nope.yaml", "folder/mine", "nope.yml"])
def test_a_missing_recipe_file_is_called_missing(name):
    with pytest.raises(UsageError, match=f"there is no file {name}"):
        find_recipe(name)


def test_every_field_has_a_default_but_the_model():
    assert [name for name, field in Recipe.model_fields.items() if field.is_required()] == ["model"]


def test_another_score_takes_neither_the_threshold_nor_the_ratio_beside_it():
    before = ConvertConfig(score="similarity", bypass="merge", schedule="all", threshold=0.3)
    after = build(ConvertConfig, over(before.model_dump(), {"score": "mutual"}))
    assert (before.ratio, after.threshold, after.ratio) == (1.0, None, ConvertConfig.model_fields["ratio"].default)
    moved = build(ConvertConfig, over({**before.model_dump(), "ratio": 0.9}, {"score": "mutual", "threshold": 0.1}))
    assert (moved.threshold, moved.ratio) == (0.1, 0.9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"convert": {"method": "tome"}, "mean_macs": 0.7}, "a mean of the MACs is for conversions with thresholds"),
        ({"convert": {"method": "tome"}, "distill": {"steps": 2}}, "'similarity' has nothing to learn"),
        ({"convert": {"method": "spa"}, "distill": {"steps": 2}}, "'gate' learns in finetune"),
        ({"convert": {"method": "impact"}}, "score impact would choose at random: add distill"),
        ({"convert": {"method": "tome"}, "finetune": {"steps": 2, "cut": 1.0}}, "set cut to 0"),
        ({"convert": {"method": "tome"}, "finetune": {"steps": 2, "gates": 1.0}}, "set gates to 0"),
        ({"convert": {"method": "tosa"}, "finetune": {"labels": 0.0, "smoothing": 0.1}}, "smoothing is of labels"),
        ({"head": "light"}, "--head goes with a new head"),
        ({"task": "nonsense"}, "there is no task 'nonsense'"),
        ({"data": {"train": "images", "list": "x"}}, "--list goes with sources of maps"),
    ],
)
def test_a_recipe_that_run_would_refuse_is_not_valid(options, words, tmp_path, tosa):
    recipe = {"model": "quickstart", "finetune": {"steps": 2}, **options}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for command in (("recipes", "validate"), ("run",)):
        code, _, err = tosa(*command, tmp_path / "recipe.yaml")
        assert code == 2
        assert words in " ".join(err.split())


def test_a_recipe_that_trains_nothing_that_has_to_be_trained_is_not_valid(tmp_path, tosa):
    (tmp_path / "recipe.yaml").write_text("model: quickstart\n")
    for command in (("recipes", "validate"), ("run",)):
        code, _, err = tosa(*command, tmp_path / "recipe.yaml")
        assert code == 2
        assert "the recipe trains nothing" in err


def test_no_is_a_word_for_the_precision(tmp_path):
    assert read_recipe(written(tmp_path, "model: a\ndistill: {precision: no}\n")).distill.precision == "no"


def test_first_lines_of_our_recipes_are_sentences():
    """``recipes ls`` shows nothing else of them."""
    for path in recipes_folder().glob("*.yaml"):
        assert path.read_text().splitlines()[0].endswith("."), path


def test_a_run_that_could_not_begin_leaves_nothing(tmp_path, tosa):
    (tmp_path / "recipe.yaml").write_text("model: vit_tiny_patch16_224\ndistill: {steps: 1}\n")
    for _ in range(2):
        code, _, err = tosa("run", "recipe.yaml", "--out", "out")  # without a network
        assert code == 1
        assert "not empty" not in err
        assert not (tmp_path / "out").exists()


def test_a_recipe_names_what_is_fine_tuned_where_nothing_else_does(quick_run, tmp_path, tosa):
    """Found: it was the newest run, whatever the recipe's model."""
    asked = {"model": "quickstart", "convert": {"method": "tome"}, "finetune": {"steps": 1, "batch_size": 2}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(asked))
    shutil.copytree(quick_run, tmp_path / "newest")
    code, _, err = tosa("finetune", "--recipe", "recipe.yaml", "--out", "out")
    assert code == 0, err
    assert load("out").tosa_config.score == "similarity"


def test_a_recipe_of_a_run_has_the_runs_conversion(quick_run, tmp_path, tosa):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": str(quick_run), "finetune": {"steps": 2}}))
    code, _, err = tosa("recipes", "validate", tmp_path / "recipe.yaml")
    assert code == 0, err


def test_a_recipe_that_names_no_conversion_may_be_of_a_run_on_the_hub():
    for more in ({}, {"seed": 3}):
        check_recipe(build(Recipe, {"model": "someone/a-run", "finetune": {"steps": 2}, **more}))


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"num_classes": 5}, "has 10 outputs, not 5; leave it out, or name what"),
        ({"checkpoint": "other.pth"}, "was not made from other.pth"),
        ({"task": "depth"}, "is another than asked for"),
        (
            {"convert": {"score": "similarity", "bypass": "merge", "layers": [2, 4, 6], "ratio": 0.5}},
            "(score, bypass, ",
        ),
    ],
)
def test_a_run_is_trained_on_as_what_it_is(recipe, words, quick_run, tmp_path, tosa):
    """Found: what the recipe said of its model was noted and not done."""
    asked = {"model": str(quick_run), "finetune": {"steps": 1, "batch_size": 2}, **recipe}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(asked))
    code, _, err = tosa("run", tmp_path / "recipe.yaml", "--out", "out")
    assert code == 2
    assert words in err
    assert not (tmp_path / "out").exists()


def test_a_recipe_for_another_stage_of_a_run_does_not_rename_its_model(quick_run, tmp_path, tosa):
    asked = {"model": "deit_tiny", "finetune": {"steps": 1, "batch_size": 2}, "num_classes": 10}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(asked))
    code, _, err = tosa("finetune", quick_run, "--recipe", tmp_path / "recipe.yaml", "--out", "out")
    assert code == 0, err
    assert read_recipe(tmp_path / "out" / "recipe.yaml").model == "quickstart"


def test_a_run_on_the_hub_is_trained_on(quick_run, tmp_path, tosa, monkeypatch):
    monkeypatch.setattr("tosa_convert.runs.hub.run_of", lambda _: quick_run)
    code, _, err = tosa("finetune", "hf:someone/a-run", "--steps", 1, "--batch-size", 2, "--out", "out")
    assert code == 0, err
    assert load("out").tosa_config.layers == [2, 4, 6]


def test_logits_of_a_model_without_a_classifier_are_refused_before_anything_is_trained(tmp_path, tosa):
    asked = {"model": "quickstart", "num_classes": 0, "convert": {"layers": [2, 4], "ratio": 0.5}}
    asked |= {"distill": {"steps": 1}, "finetune": {"steps": 1, "logits": 1.0}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(asked))
    code, _, err = tosa("run", tmp_path / "recipe.yaml", "--out", "out")
    assert code == 2
    assert "no classifier whose logits could be learnt from" in err
    assert not (tmp_path / "out").exists()
