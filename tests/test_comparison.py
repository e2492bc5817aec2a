"""Methods compared at the same budgets, and the commands of plans and comparisons."""

import json

import pytest
import torch
import yaml
from conftest import lively, write_images
from families import FAMILIES, HF_SMALL, SMALL
from timm.models.vision_transformer import VisionTransformer
from transformers import ViTConfig, ViTForImageClassification

from tosa_convert import UsageError, compare, convert, load
from tosa_convert.data.sampling import sample
from tosa_convert.measure.macs import count_macs
from tosa_convert.measure.similarity import figures, observe
from tosa_convert.models.adapter import adapter_of
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.planning import rivals
from tosa_convert.planning.budget import at_budget
from tosa_convert.reporting.plots import pareto_plot


@pytest.mark.parametrize(
    "name",
    [
        "similarity/merge",
        "tome",
        "tosa",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("evit", "idle", "random", "norm/borrow/all")),
    ],
)
def test_methods_come_to_the_budget(name):
    model = VisionTransformer(**{**SMALL, "img_size": 64})
    share = count_macs(at_budget(model, name, 0.85)) / count_macs(model)
    assert 0.82 <= share <= 0.85


def test_a_comparison_measures_every_method_on_the_same_images(labelled):
    model = lively(VisionTransformer(**{**SMALL, "depth": 4, "num_classes": 10}))
    found = compare(model, labelled, budgets=[0.9], methods=["similarity/merge"], images=12, runtime=None)
    assert [row["method"] for row in found["rows"]] == ["similarity/merge", "random"]
    assert found["images"] == 12
    assert found["original"]["patch"] == pytest.approx(1)
    assert found["original"]["agreement"] == 1
    photos, _, labels = sample(labelled, preprocessing_of(model), 12)
    assert sorted(set(labels.tolist())) == list(range(10))
    row = found["rows"][0]
    converted = at_budget(model, "similarity/merge", 0.9)
    output = observe(converted, photos)
    assert row["macs"] == pytest.approx(count_macs(converted) / count_macs(model))
    assert row["top1"] == pytest.approx((output.output.argmax(-1) == labels).float().mean().item())
    assert row["patch"] == pytest.approx(figures(output, observe(model, photos))["patch"].mean().item(), rel=1e-4)
    assert not hasattr(model, "tosa_config")


def test_a_method_that_cannot_is_named_and_the_others_go_on():
    model = lively(FAMILIES["timm vit"]())
    found = compare(model, budgets=[0.4], methods=["tosa", "evit"], images=4, runtime=None)
    assert any(note.startswith("tosa at 0.4") for note in found["notes"])
    assert "evit" in {row["method"] for row in found["rows"]}


@pytest.mark.parametrize("name", ["tom", "similarity/merg", "similarity/merge/all/more", "similarity/fuse"])
def test_methods_that_do_not_exist_are_refused(name):
    with pytest.raises(UsageError):
        compare(FAMILIES["timm vit"](), budgets=[0.9], methods=[name], images=4, runtime=None)


def test_few_images_are_looked_at_in_several_crops(tmp_path):
    write_images(tmp_path, 3, size=64)
    preprocessing = preprocessing_of(load("quickstart"))
    photos, _, labels = sample(tmp_path, preprocessing, 7)
    assert photos.shape == (7, 1, 28, 28)
    assert labels.tolist() == [-1] * 7
    assert len({tuple(image.flatten().tolist()) for image in photos}) == 7
    assert torch.equal(sample(tmp_path, preprocessing, 7)[0], photos)


def test_figures_of_models_with_patches_gone():
    model = lively(FAMILIES["timm vit"]())
    images = torch.randn(2, 3, 32, 32)
    wanted = observe(model, images)
    found = observe(convert(model, score="random", bypass="drop", layers=[3], ratio=0.5), images)
    assert set(figures(found, wanted)) == {"class", "agreement"}
    assert adapter_of(model).prefix == 1


def test_the_commands_leave_a_recipe_tables_and_plots(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rivals, "lasting", lambda _: ["tome"])  # the others would only take time
    from tosa_convert.cli.main import main

    def tool(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        assert stop.value.code == 0
        return capsys.readouterr().out

    model = str(tmp_path / "model")  # smaller than the quickstart's: multiply–adds are counted many times
    config = ViTConfig(**{**HF_SMALL, "num_hidden_layers": 4}, num_labels=5)
    lively(ViTForImageClassification(config)).save_pretrained(model)
    out = str(tmp_path / "plan")
    results = json.loads(tool("plan", model, "--budget", "0.85", "--images", "4", "--out", out, "--json"))
    assert results["macs"] <= 0.85
    for name in ("plan.yaml", "plan.json", "plan.png"):
        assert (tmp_path / "plan" / name).stat().st_size > 100
    recipe = yaml.safe_load((tmp_path / "plan" / "plan.yaml").read_text())
    assert "export" in recipe
    del recipe["export"]  # of twelve layers it takes a minute; test_export exports every bypass
    (tmp_path / "plan" / "short.yaml").write_text(yaml.safe_dump(recipe))
    run = str(tmp_path / "run")
    tool("run", f"{out}/short.yaml", "--out", run)
    assert load(f"{run}/convert").tosa_config.ratio == results["convert"]["ratio"]
    out = str(tmp_path / "compare")
    table = tool("compare", model, "--budgets", "0.9", "--methods", "evit,mctf", "--images", "4", "--out", out)
    assert "random" in table
    assert "mctf" in table
    assert (tmp_path / "compare" / "compare.png").stat().st_size > 100
    assert "evit" in (tmp_path / "compare" / "compare.md").read_text()
    for verb in ("plan", "compare"):
        with pytest.raises(SystemExit) as stop:
            main([verb, model, "--images", "4", "--out", out])
        assert stop.value.code != 0
        assert "is not empty; choose another --out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", model, "--budget", "0.01", "--images", "4", "--out", str(tmp_path / "refused")])
    assert not (tmp_path / "refused").exists()


def test_what_cannot_be_distilled_is_left_out_of_a_comparison():
    found = compare(
        load("quickstart"), budgets=[0.9], methods=["impact/identity"], distill_steps=1, images=4, runtime=None
    )
    assert [row["method"] for row in found["rows"]] == ["random"]
    assert any(
        note.startswith("impact/identity is left out: score 'impact' learns for one choice") for note in found["notes"]
    )


def test_lines_of_a_plot_can_be_told_apart(tmp_path, monkeypatch):
    drawn = {}

    def plot(self, *_, label, **style):
        drawn[label] = tuple(sorted(style.items()))

    monkeypatch.setattr("matplotlib.axes.Axes.plot", plot)
    names = [*(f"score{index}/merge" for index in range(13)), "random"]
    rows = [{"method": name, "budget": 0.8, "macs": 0.8, "patch": 0.9} for name in names]
    pareto_plot({"rows": rows, "keep": "patches"}, tmp_path / "plot.png")
    assert set(drawn) == set(names)
    assert len(set(drawn.values())) == len(drawn)
