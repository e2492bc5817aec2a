"""A user's own score, bypass, schedule and model family are as good as ours; each recipe of docs/ARCHITECTURE.md."""

import copy
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import lively
from families import FAMILIES, SMALL
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tosa_convert import (
    Bypass,
    DistillSettings,
    FinetuneSettings,
    Schedule,
    Score,
    UsageError,
    compare,
    convert,
    distill,
    evaluate,
    export_onnx,
    finetune,
    flops,
    load,
    random_control,
    save,
)
from tosa_convert.base.progress import Progress
from tosa_convert.data.images import Images
from tosa_convert.data.sampling import sample
from tosa_convert.methods.score import Reads
from tosa_convert.methods.token_ops import gather_tokens, rejoin_tokens
from tosa_convert.models import adapter as adapters
from tosa_convert.models.adapter import run
from tosa_convert.models.families.timm_vit import TimmVit
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.planning.allocation import Allocation
from tosa_convert.planning.search import Search
from tosa_convert.reporting.plan_tables import compare_table
from tosa_convert.selective.selection import chosen_tokens, selective_blocks
from tosa_convert.tasks.task import Metric, Task
from tosa_convert.training.finetuning import loss_weights


class Distinct(Score):
    """Tokens far from the mean token attend."""

    reads = Reads.TOKENS

    class Options(Score.Options):
        power: float = 1.0

    def score(self, view):
        away = (view.tokens - view.tokens.mean(1, keepdim=True)).norm(dim=-1)
        return away**self.options.power


class Learnt(Score):
    """One weight per head, on the length of the keys, which learns the length of the next layer's keys."""

    learns = True

    def setup(self, site):
        self.weights = nn.Parameter(torch.ones(site.heads))

    def read(self, queries, keys):
        return keys.norm(dim=-1) * self.weights[:, None]

    def loss(self, read, own):
        return (self.read(*read) - own[1].norm(dim=-1)).square().mean()


class Halve(Bypass):
    """Skipped tokens are halved."""

    class Options(Bypass.Options):
        factor: float = 0.5

    def apply(self, run, tokens, normed, choice):
        return rejoin_tokens(tokens * self.options.factor, choice.attended, run(gather_tokens(tokens, choice.attended)))


class LastTwo(Schedule):
    """The last two layers."""

    def layers(self, depth, first):
        return [depth - 1, depth]


def test_a_score_of_ones_own_is_converted_counted_saved_and_exported(photos, tmp_path):
    model = convert(load("quickstart"), score=Distinct(power=0.5), bypass="merge", layers={6: 0.8, 9: 0.5})
    images = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(images)
    tokens = selective_blocks(model)[0].selector
    assert tokens.options.power == 0.5
    assert 0 < flops(model).saved < 1
    save(model, tmp_path / "run")
    again = load(tmp_path / "run")
    assert again.tosa_config.score == f"{__name__}:Distinct"
    with torch.no_grad():
        assert torch.equal(again(images), wanted)
    assert export_onnx(again, tmp_path / "onnx", photos).agreement == 1
    assert random_control(again).tosa_config.score == "random"


def test_it_chooses_as_it_says():
    model = convert(lively(FAMILIES["timm vit"]()), score=Distinct, layers=[1], ratio=0.5)
    seen = {}
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.update(tokens=inputs[0]))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        run(model, images)
    tokens = seen["tokens"]
    away = (tokens - tokens.mean(1, keepdim=True)).norm(dim=-1)[:, 1:]
    wanted = away.topk(8, dim=1).indices + 1
    assert [set(row.tolist()) - {0} for row in chosen_tokens(model)[1]] == [set(row.tolist()) for row in wanted]


@pytest.mark.parametrize("bypass", ["identity", "borrow", "merge", "persist"])
def test_it_goes_with_every_bypass(bypass):
    model = convert(lively(FAMILIES["timm vit"]()), score=Distinct(), bypass=bypass, layers=[2, 3], ratio=0.6)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert next(iter(run(model, images).values())).isfinite().all()
    assert chosen_tokens(model).keys() >= {2}


def test_it_is_trained(photos):
    model = convert(load("quickstart"), score=Learnt(), layers=[4, 8], ratio=0.5)
    first = distill(model, photos, DistillSettings(steps=1, batch_size=4, augment="none", lr=1e-9))
    last = distill(model, photos, DistillSettings(steps=20, batch_size=4, augment="none", lr=0.1))
    assert last["loss"] < first["loss"]
    assert not torch.equal(model.blocks[3].selector.weights, torch.ones(3))


def test_a_bypass_and_a_schedule_of_ones_own():
    model = convert(
        lively(FAMILIES["timm vit"]()), score="norm", bypass=Halve(factor=0.25), schedule=LastTwo(), ratio=0.5
    )
    assert model.tosa_config.layers == [5, 6]
    entered, left = {}, {}
    model.blocks[5].register_forward_pre_hook(lambda module, inputs: entered.update(tokens=inputs[0]))
    model.blocks[5].register_forward_hook(lambda module, inputs, output: left.update(tokens=output))
    with torch.no_grad():
        run(model, torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    skipped = sorted(set(range(17)) - set(chosen_tokens(model)[6][0].tolist()))
    assert len(skipped) == 8
    assert torch.allclose(left["tokens"][0, skipped], entered["tokens"][0, skipped] * 0.25)


def test_a_model_family_in_a_file_of_its_own(monkeypatch):
    class Odd(VisionTransformer):
        """A model that only its own adapter knows."""

    class OddAdapter(TimmVit):
        """As timm's ViT."""

    module = types.ModuleType("odd_family")
    module.find = lambda model: OddAdapter(model) if isinstance(model, Odd) else None
    known = adapters.families()
    monkeypatch.setattr(adapters, "families", lambda: [module, *known])
    model = lively(FAMILIES["timm vit"]())
    model.__class__ = Odd
    converted = convert(model, layers=[2, 4], ratio=0.5)
    assert type(selective_blocks(converted)[0].adapter) is OddAdapter


class Dial(VisionTransformer):
    """A model with one output, which is no class."""


class Reading(Images):
    """The label is the number that an image is named after."""

    def label(self, index):
        return float(Path(self.reader.filename(index)).stem)


class Regression(Task):
    """One number per image."""

    metrics = {"mae": Metric("mean error", higher_is_better=False)}  # noqa: RUF012

    @classmethod
    def suits(cls, model):
        return isinstance(model, Dial)

    def read(self, *given):
        return Reading(*given)

    def has_labels(self, images, model):
        return True

    def measure(self, output, labels):
        return {"mae": (output[:, 0] - labels).abs()}

    def loss(self, output, labels, settings):
        return (output[:, 0] - labels).square().mean()


def test_a_task_in_a_file_of_its_own(photos, tmp_path):
    """It is measured, learnt, exported, compared and planned for, where classification would be."""
    model = lively(Dial(**{**SMALL, "depth": 3, "num_classes": 1}))
    converted = convert(copy.deepcopy(model), score="norm", bypass="merge", schedule="all", ratio=0.6)
    read = sample(photos, preprocessing_of(model), 8, Reading)
    assert read[2].tolist() == list(range(8))
    with torch.no_grad():
        errors = [(each(read[0])[:, 0] - read[2]).abs().mean().item() for each in (model, converted)]
    found = evaluate({"original": model, "converted": converted}, photos, reference="original")["models"]
    assert [figures["mae"] for figures in found.values()] == pytest.approx(errors, rel=1e-5)
    check = export_onnx(converted, tmp_path / "onnx", photos, original=model)
    assert check.metrics["mae"]["onnx"] == pytest.approx(errors[1], rel=1e-4)
    assert check.to_dict()["mae"]["original"] == pytest.approx(errors[0], rel=1e-4)
    compared = compare(model, photos, budgets=[0.9], methods=["norm/merge"], images=8, runtime=None)
    assert compared["original"]["mae"] == pytest.approx(errors[0], rel=1e-5)
    assert "mean error" in compare_table(compared).columns
    search = Search(model, read[0], read[2], None, None, 4, Progress())
    search.build("norm", "merge")
    drop = search.drop(Allocation(dict.fromkeys(search.layers, 0.5)))
    with torch.no_grad():
        after = (search.probe(read[0])[:, 0] - read[2]).abs().mean().item()
    assert drop == pytest.approx(after - errors[0], abs=1e-4)
    settings = FinetuneSettings(steps=30, batch_size=8, augment="none", lr=0.003)
    assert loss_weights(settings, Reading(photos, preprocessing_of(model)), converted)["labels"] == 1
    finetune(converted, photos, settings)
    assert evaluate(converted, photos)["models"]["model"]["mae"] < errors[1]


def test_a_run_whose_score_is_not_imported_says_so(tmp_path, monkeypatch):
    module = types.ModuleType("someones_scores")
    monkeypatch.setitem(sys.modules, "someones_scores", module)
    kind = type("Theirs", (Distinct,), {"__module__": "someones_scores", "__qualname__": "Theirs"})
    save(convert(load("quickstart"), score=kind(), layers=[4]), tmp_path / "run")
    config = (tmp_path / "run" / "config.json").read_text()
    (tmp_path / "run" / "config.json").write_text(config.replace("Theirs", "Missing"))
    with pytest.raises(UsageError, match="import someones_scores first"):
        load(tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "similarity", "rows": 8}, "an option of score attention, which this conversion does not use"),
        ({"bypass": "borrow", "selection": "per_head"}, "an option of bypass identity"),
        ({"score": Halve()}, "score is a bypass: Halve; give it as bypass="),
        ({"row": 8}, "did you mean 'rows'"),
        ({"score": "similarty"}, "did you mean 'similarity'"),
        ({"method": "tomee"}, "there is no method 'tomee'"),
    ],
)
def test_options_belong_to_their_part(options, message):
    with pytest.raises(UsageError, match=message):
        convert(load("quickstart"), **options)


class Sought(Score):
    reads = Reads.CLASS_QUERY

    def score(self, view):
        return view.class_logits()


def test_a_score_by_the_class_query(images):
    """As class_query; where there is none to go by, it is refused."""
    model = lively(FAMILIES["timm vit"]())
    sought, known = (
        convert(copy.deepcopy(model), score=score, layers=[3], ratio=0.5) for score in (Sought, "class_query")
    )
    assert torch.equal(sought(images), known(images))
    with pytest.raises(UsageError, match=r"goes by the query of the class token, .* use borrow"):
        convert(FAMILIES["timm vit"](), score=Sought, bypass="persist", layers=[3], ratio=0.5)
    with pytest.raises(UsageError, match="needs a class token"):
        convert(FAMILIES["timm siglip"](), score=Sought, layers=[3], ratio=0.5)


def test_a_score_that_fails_while_it_is_made_leaves_the_model_as_it_was(images):
    class Failing(Score):
        reads = Reads.TOKENS

        def setup(self, site):
            if site.layer == 4:
                raise MemoryError

        def score(self, view):
            return view.tokens.norm(dim=-1)

    for bypass in ("identity", "persist"):
        model = FAMILIES["timm vit"]().eval()
        wanted, members = model(images), set(vars(model))
        with pytest.raises(MemoryError):
            convert(model, score=Failing, bypass=bypass, schedule="all", ratio=0.5)
        assert torch.equal(model(images), wanted)
        assert set(vars(model)) == members
        assert not any(hasattr(block, "selection") for block in model.blocks)
