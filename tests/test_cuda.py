"""On a GPU as on a CPU: ``python -m pytest -m cuda -n 0``, on a machine with one."""

import copy
import functools
import json

import pytest
import torch
from conftest import check_resuming
from references import first

from tosa_convert import (
    BenchSettings,
    DistillSettings,
    FinetuneSettings,
    bench,
    convert,
    distill,
    evaluate,
    find_plan,
    finetune,
    flops,
    load,
)
from tosa_convert.data.sampling import sample
from tosa_convert.export.onnx import export_onnx
from tosa_convert.measure.evaluation import random_control
from tosa_convert.methods.method import control, published
from tosa_convert.models.adapter import run
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.planning.budget import at_budget
from tosa_convert.planning.mean_macs import at_mean
from tosa_convert.selective.row_attention import attend
from tosa_convert.selective.selection import choosing_blocks, keeps_any_number

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
METHODS = [name for name in published() if name != control()]
ROW = (5, 9, 1, 30)


@pytest.fixture
def seen(labelled):
    """Photos (B, 1, 28, 28) in double precision, in which hardly two tokens are as good as each other."""
    return sample(labelled, preprocessing_of(load("quickstart")), 8)[0].double()


def converted(method: str, images: torch.Tensor):
    """In double precision, at 0.7 of the multiply–adds; gates get random weights, by which images differ."""
    model = load("quickstart").double()
    if not keeps_any_number(gated := convert(copy.deepcopy(model), method=method)):
        return at_budget(model, method, 0.7)
    generator = torch.Generator().manual_seed(5)
    for block in choosing_blocks(gated):
        for weights in block.selector.parameters():
            weights.data = torch.randn(weights.shape, generator=generator, dtype=torch.double) / 4
    return at_mean(gated, images, 0.8)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_each_method_gives_what_it_gives_on_a_cpu(method, seen):
    model = converted(method, seen)
    wanted, macs = first(run(model, seen)), flops(model, images=seen).macs
    found = first(run(model.cuda(), seen.cuda())).cpu()
    assert torch.allclose(found, wanted, atol=1e-6)
    assert flops(model, images=seen).macs == macs
    chance = random_control(model)
    wanted = first(run(chance.cpu(), seen))
    assert torch.isfinite(first(run(chance.cuda(), seen.cuda()))).all()
    if keeps_any_number(model):  # chance is drawn on the CPU there
        assert torch.allclose(first(run(chance, seen.cuda())).cpu(), wanted, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_each_method_runs_in_half_precision(method, seen):
    model = converted(method, seen).to("cuda", torch.bfloat16)
    assert torch.isfinite(first(run(model, seen.to("cuda", torch.bfloat16)))).all()


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [None, (1, 1), (4, 1), (4, sum(ROW))])
def test_images_of_a_row_attend_within_themselves(kind, shape):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, 4, sum(ROW), 16, generator=generator, dtype=torch.double) for _ in range(3)]
    mask = torch.randn(1, *shape, sum(ROW), generator=generator, dtype=torch.double) if shape else None
    near = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2}[kind]
    results = []
    for place in (torch.device("cuda"), torch.device("cpu")):
        as_asked = {"device": place, "dtype": kind if place.type == "cuda" else torch.double}
        parts = [each.to(**as_asked).requires_grad_() for each in drawn]
        found = attend(*parts, ROW, None if mask is None else mask.to(**as_asked))
        results.append([found, *torch.autograd.grad(found.square().sum(), parts)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours.double().cpu(), theirs, atol=near * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("method", ["tosa", "mctf", "evit", "spa", "impact"])
def test_methods_are_trained(method, precision, labelled):
    model = convert(load("quickstart"), method=method)
    before = copy.deepcopy(model.state_dict())
    settings = {"steps": 3, "batch_size": 4, "precision": precision}
    if method in ("tosa", "impact"):
        distill(model, labelled, DistillSettings(**settings, **({"examples": 4} if method == "impact" else {})))
    result = finetune(model, labelled, FinetuneSettings(**settings), device="cuda")
    assert 0 < result["loss"] < 100
    after = model.state_dict()
    assert all(value.device.type == "cpu" for value in after.values()), "it is back where it was"
    assert any(not torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("method", ["tosa", "spa"])
def test_a_killed_training_resumes_to_the_same_result(method, labelled, tmp_path, monkeypatch):
    settings = FinetuneSettings(steps=6, batch_size=4, log_every=1, checkpoint_minutes=1e-9)
    training = functools.partial(finetune, data=labelled, settings=settings, seed=5, device="cuda")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        check_resuming(training, lambda: convert(load("quickstart"), method=method), tmp_path, monkeypatch)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("adaptive", [False, True])
def test_plans_are_made(adaptive, labelled):
    model = load("quickstart")
    images = sample(labelled, preprocessing_of(model), 16)[0]
    found = find_plan(model.cuda(), images.cuda(), 0.8, adaptive=adaptive)
    assert found.cost <= 0.8
    assert evaluate(convert(model, found.config), labelled)["images"] == 20


def test_a_model_on_a_gpu_is_exported(labelled, tmp_path):
    model = convert(load("quickstart").cuda(), layers=[2, 4], ratio=0.5)
    export_onnx(model, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_models_are_timed_with_their_memory(precision):
    models = {name: convert(load("quickstart"), layers=[2, 4], ratio=ratio) for name, ratio in (("a", 1.0), ("b", 0.5))}
    settings = BenchSettings(runtimes=["eager", "compile"], batch_sizes=[64], precisions=[precision], rounds=3)
    cases = bench(models, settings, device="cuda")["cases"]
    weights = sum(value.nbytes for value in models["a"].state_dict().values())
    assert [case["runtime"] for case in cases] == ["eager", "compile"]
    assert all(weights < figures["memory"] < 100 * weights for figures in cases[0]["models"].values())


def test_the_commands_run(tosa, labelled):
    on_gpu = ("--device", "cuda")
    short = ("--steps", 2, "--batch-size", 4, *on_gpu)
    for command in (
        ("distill", "quickstart", "--data", labelled, *short, "--out", "distilled"),
        ("finetune", "distilled", "--data", labelled, *short, "--out", "tuned"),
        ("finetune", "quickstart", "--method", "spa", "--data", labelled, *short, "--out", "learnt"),
        ("plan", "quickstart", "--data", labelled, "--budget", 0.8, "--adaptive", *on_gpu, "--out", "planned"),
        ("eval", "tuned", "--data", labelled, *on_gpu),
        ("compare", "quickstart", "--data", labelled, "--budgets", 0.8, "--methods", "tome,mctf", *on_gpu),
        ("show", "tuned", "--image", labelled / "0-class/000.png", *on_gpu, "--out", "seen.png"),
        ("features", "tuned", "--images", labelled, *on_gpu, "--out", "rows.npz"),
        ("export", "tuned", "--data", labelled),
        ("bench", "tuned", *on_gpu, "--rounds", 2, "--runtime", "eager"),
    ):
        code, out, err = tosa(*command)
        assert code == 0, (command[0], err[-800:])
    code, out, _ = tosa("eval", "tuned", "--data", labelled, *on_gpu, "--json")
    assert code == 0
    assert json.loads(out)
