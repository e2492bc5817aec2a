import json
import shutil
import time
from contextlib import contextmanager

import pytest
import torch
from conftest import lively
from families import FAMILIES
from rich.console import Console
from timm.models.vision_transformer import VisionTransformer

from tosa_convert import BenchSettings, UsageError, bench, convert, load, original, save
from tosa_convert.base.progress import Progress
from tosa_convert.base.timing import Timing, interleave, pinned, processors
from tosa_convert.cli.main import main
from tosa_convert.data.sampling import sample
from tosa_convert.export import runtimes
from tosa_convert.export.onnx import exported
from tosa_convert.measure import peak_memory
from tosa_convert.measure.macs import flops
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.reporting.result_tables import bench_table

QUICK = {"rounds": 2, "memory": False}


def converted(**options):
    return convert(load("quickstart"), layers=[2, 4], ratio=0.5, **options)


def test_contestants_run_in_turn_and_warm_up_is_not_timed():
    order = []
    timings = interleave({name: lambda name=name: order.append(name) for name in "AB"}, rounds=3, warmup=1)
    assert order == list("ABABABAB")
    assert {len(timing.seconds) for timing in timings.values()} == {3}


def test_a_slower_contestant_is_measured_as_slower():
    timings = interleave({"slow": lambda: time.sleep(0.004), "fast": lambda: None}, rounds=3)
    assert min(timings["fast"].speedups(timings["slow"])) > 1
    assert timings["slow"].median >= 0.004


def test_speedups_compare_within_a_round():
    """A machine that is slow for a while slows both: the ratio does not see it."""
    assert Timing([1.0, 10.0, 2.0]).speedups(Timing([2.0, 20.0, 4.0])) == [2, 2, 2]


def test_threads_are_pinned_and_given_back():
    before = torch.get_num_threads(), processors()
    with pinned(1):
        assert (torch.get_num_threads(), processors()) == (1, 1)
    assert (torch.get_num_threads(), processors()) == before


class Counted(Progress):
    """Counts the steps of each bar."""

    def __init__(self):
        super().__init__()
        self.bars = []

    @contextmanager
    def track(self, what, total, done=0, unit="", per_step=1):
        steps = []
        self.bars.append((total, steps))
        yield lambda note="": steps.append(note)


@pytest.mark.parametrize("images", [None, 8, 3])
@pytest.mark.parametrize("memory", [False, True])
def test_what_is_timed_is_said_and_foreseen(images, memory, labelled, monkeypatch):
    """Found: a bar that ran past its end, and rounds that were not made."""
    monkeypatch.setattr("tosa_convert.measure.timed_case._peak", lambda *_: 2**20)
    models = {"original": load("quickstart"), "converted": converted()}
    settings = BenchSettings(runtimes=["eager"], rounds=5, batch_sizes=[1, 4], memory=memory)
    progress = Counted()
    given = {} if images is None else {"data": labelled, "images": images}
    results = bench(models, settings, device="cpu", progress=progress, **given)
    assert [len(steps) for _, steps in progress.bars] == [total for total, _ in progress.bars]
    made = [(case["rounds"], case["images"]) for case in results["cases"]]
    assert made == {None: [(5, None), (5, None)], 8: [(3, 8), (3, 8)], 3: [(3, 3), (5, 4)]}[images]
    notes = " ".join(bench_table(results).notes)
    assert {None: "of 5 rounds,", 8: "of 3 passes over the images", 3: "of 3 passes over"}[images] in notes


def test_a_peak_that_cannot_be_measured_leaves_the_timings():
    """Such as that of a model whose class cannot be built again from a file."""
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=5)
    model = convert(model, layers=[2], ratio=0.5)
    settings = BenchSettings(runtimes=["eager"], rounds=1, threads=1)
    results = bench({"original": original(model), "converted": model}, settings, device="cpu")
    assert results["cases"][0]["models"]["converted"]["memory"] is None
    assert any("no peak memory" in note for note in results["notes"])


def test_a_batch_that_does_not_fit_is_left_out(monkeypatch):
    runner = runtimes.torch_runner

    def full(model, batches, compiled):
        if len(batches[0]) > 1:
            raise torch.OutOfMemoryError
        return runner(model, batches, compiled)

    monkeypatch.setattr(runtimes, "torch_runner", full)
    settings = BenchSettings(runtimes=["eager"], batch_sizes=[1, 512], **QUICK)
    results = bench({"original": load("quickstart")}, settings, device="cpu")
    assert [case["batch_size"] for case in results["cases"]] == [1]
    assert "eager, float32, batch 512, 28×28 px is left out: it does not fit into memory" in results["notes"]


def test_no_model_is_timed_under_the_name_of_another(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "quickstart", "--rounds", "1", "--against", "deit_tiny", "--against", "deit_tiny"])
    assert stopped.value.code == 2
    assert "deit_tiny: this name is timed already" in capsys.readouterr().err


def test_every_case_has_its_figures_and_its_ideal():
    model = convert(lively(FAMILIES["hf Dinov2Model"]()), layers=[2], ratio=0.5)
    settings = BenchSettings(runtimes=["eager", "onnx"], batch_sizes=[1, 2], sizes=[40], **QUICK)
    results = bench({"original": original(model), "converted": model}, settings, device="cpu")
    assert len(results["cases"]) == 2 * 2
    for case in results["cases"]:
        ours = case["models"]["converted"]
        assert ours["speedup"] > 0
        assert ours["reached"] == pytest.approx(ours["speedup"] / ours["ideal"])
    cost = flops(model, (40, 40))
    ideal = cost.original / (cost.macs - cost.selectors)
    assert results["cases"][0]["models"]["converted"]["ideal"] == pytest.approx(ideal)
    assert json.loads(json.dumps(results)) == results


def test_no_gain_is_said_in_plain_words():
    model = converted()
    results = bench({"original": original(model), "converted": model}, BenchSettings(runtimes=["eager"], **QUICK))
    figures = results["cases"][0]["models"]["converted"]
    for speedup, lowest, said in (
        (0.9, 0.8, "no gain at this size"),
        (1.1, 0.9, "within the spread"),
        (1.1, 1.05, None),
    ):
        figures.update(speedup=speedup, speedup_quartiles=[lowest, 1.2])
        notes = [note for note in bench_table(results).notes if note.startswith("converted")]
        assert [said in note for note in notes] == ([True] if said else [])


@pytest.mark.parametrize("several", [False, True])
def test_the_table_of_a_benchmark_is_legible_at_80_columns(several, capsys):
    model = {"ms": 102.5, "ms_quartiles": [101.4, 103.2], "memory": 2**30}
    ours = {**model, "speedup": 1.2, "speedup_quartiles": [1.1, 1.3], "ideal": 1.4, "reached": 0.86}
    case = {"runtime": "compile", "batch_size": 16, "size": [518, 518], "precision": "float32"}
    case["models"] = {"original": model, "converted": ours, "runs/deit_tiny-20260101-120000": ours}
    others = (
        [{**case, "runtime": "eager", "batch_size": 1, "precision": "bfloat16", "size": [224, 224]}] if several else []
    )
    settings = BenchSettings().model_dump()
    machine = {"cpu": "a processor with a long name", "torch": "2", "onnxruntime": "1"}
    table = bench_table({"notes": [], "settings": settings, "machine": machine, "reference": "original",
                         "cases": [case, *others]})  # fmt: skip
    table.print(Console(width=80))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    words = " ".join(lines).replace(",", " ").split()
    expected = ["original", "converted", "runs/deit_tiny-20260101-120000", "quartiles", "speed-up", "101–103", "1.20×"]
    assert set(expected) <= set(words)


@pytest.mark.long
def test_memory_is_measured_in_a_process_of_its_own(tmp_path):
    save(converted(), tmp_path / "run")
    few, many = (peak_memory.measure(tmp_path / "run", "eager", (batch, 1, 28, 28), 1, "float32") for batch in (1, 256))
    weights = sum(value.numel() * 4 for value in load("quickstart").parameters())
    assert weights < few < many


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"runtimes": ["tensorrt"]}, "runtime 'tensorrt' is not known"),
        ({"precisions": ["bfloat16"]}, "bfloat16 is timed on a GPU"),
        ({"batch_sizes": [0]}, "1 or more"),
        ({"sizes": [28, 30]}, "30×30 px is not a multiple of the patch size of model, 4×4"),
        ({"threads": 10_000}, "more than the"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        bench({"model": load("quickstart")}, BenchSettings(**settings), device="cpu")


def test_the_command_leaves_figures_and_a_plot(quick_run, tmp_path, capsys):
    arguments = ["--runtime", "eager", "--rounds", "2", "--no-memory", "--against", "quickstart", "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        main(["bench", str(quick_run), *arguments, "--out", str(tmp_path / "bench"), "--json"])
    assert stop.value.code == 0
    results = json.loads(capsys.readouterr().out)
    assert set(results["cases"][0]["models"]) == {"original", "converted", "quickstart"}
    assert (tmp_path / "bench/bench.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "bench/bench.json").read_text())["cases"] == results["cases"]


@pytest.mark.parametrize(
    ("kind", "shape", "fits"),
    [
        ("float32", ["batch", 1, 28, 28], True),
        ("float32", ["batch", 1, "height", "width"], True),
        ("float32", ["batch", 1, 56, 56], False),
        ("uint8", ["batch", 28, 28, 1], False),
    ],
)
def test_an_exported_file_is_timed_if_it_takes_the_images(kind, shape, fits, tmp_path):
    (tmp_path / "model.onnx").touch()
    (tmp_path / "preprocessing.json").write_text(json.dumps({"input": {"type": kind, "shape": shape}}))
    assert bool(exported(tmp_path, (28, 28))) == fits


def test_a_run_whose_file_takes_pixels_is_timed_by_another(quick_run, tmp_path, tosa):
    run = shutil.copytree(quick_run, tmp_path / "run")
    code, _, err = tosa("export", run, "--raw-input", "--min-agreement", 0.1)
    assert code == 0, err
    code, _, err = tosa("bench", run, "--runtime", "onnx", "--batch-size", 1, "--rounds", 2, "--no-memory")
    assert code == 0, err


def test_a_run_is_not_converted_anew_for_a_bench(quick_run, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", str(quick_run), "--ratio", "0.3"])
    assert stop.value.code == 2
    assert "are fixed" in capsys.readouterr().err


def test_conversions_with_thresholds_are_timed_on_images():
    """Of noise it cannot be said how many tokens it keeps."""
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=5)
    model = convert(lively(model), score="norm", bypass="merge", layers=[2, 3], threshold=2.0)
    settings = BenchSettings(runtimes=["eager", "onnx"], batch_sizes=[2], rounds=1, memory=False)
    results = bench({"original": original(model), "converted": model}, settings, device="cpu", images=3)
    assert [(case["runtime"], case["batch_size"]) for case in results["cases"]] == [("eager", 2)]
    notes = " | ".join(results["notes"])
    assert "on built-in photos, since the number of tokens differs" in notes
    assert "onnx at batch 2 is left out: the file takes one image at a time" in notes
    cost = flops(model, images=sample(None, preprocessing_of(model), 3)[0])
    many = settings.model_copy(update={"batch_sizes": [5], "runtimes": ["eager"]})
    assert bench({"converted": model}, many, device="cpu", images=3)["cases"]  # a batch of more than there are
    assert (
        f"converted: {100 * cost.macs / cost.original:.1f} % of the MACs on average over 3 crops of built-in photos"
        in notes
    )
