"""A run in a few lines: what it saves, what it keeps, how fast it is, whether its export is checked."""

from pathlib import Path

from tosa_convert.base.files import read_json
from tosa_convert.reporting.figures import pixels
from tosa_convert.reporting.result_tables import figure
from tosa_convert.reporting.table import Table, mega, percent
from tosa_convert.runs.metrics_log import read_metrics
from tosa_convert.tasks.task import every_metric


def summary_table(run: Path, cost: dict) -> Table:
    """Of a run with the MACs ``cost``; what was not measured says so, with the command that would."""
    latest = {line["stage"]: line for line in read_metrics(run) if "stage" in line}
    bench = run / "bench.json"
    rows = [
        ["MACs saved", f"{percent(cost['saved'])} ({mega(cost['original'])} → {mega(cost['macs'])}{_over(cost)})"],
        *_kept(latest.get("eval"), run),
        *_speedups(read_json(bench) if bench.exists() else None, run),
        ["ONNX check", _check(latest.get("export"), run)],
    ]
    return Table("Summary", ["", "value"], rows, [])


def _over(cost: dict) -> str:
    """Which images it is a mean of, where it differs between them."""
    return f", the mean of {cost['images']} images of {cost['data']}" if "data" in cost else ""


def _not_measured(command: str, run: Path) -> str:
    return f"not measured (tosa-convert {command} {run if not run.is_absolute() else 'RUN'})"


def _kept(results: dict | None, run: Path) -> list[list[str]]:
    """The metrics of the task where there are labels, otherwise agreement and cosine with the original."""
    models = results["models"] if results else {}
    found = models.get("converted") or models.get("model") or {}
    original = models.get("original", {})
    measured = [(name, metric.title) for name, metric in every_metric().items() if name in found]
    if measured:
        return [[title, _change(name, original, found)] for name, title in measured]
    if "agreement" in found:
        return [["agreement with the original", f"{percent(found['agreement'], 2)}, cosine {found['cosine']:.4f}"]]
    return [["kept of the original", _not_measured("eval", run)]]


def _change(name: str, original: dict, found: dict) -> str:
    before = f"{figure(name, original[name], 2)} → " if name in original else ""
    return before + figure(name, found[name], 2)


def _speedups(results: dict | None, run: Path) -> list[list[str]]:
    """One line per case of a benchmark."""
    rows = [
        [
            f"speed-up, {case['runtime']}, batch {case['batch_size']}, {pixels(case['size'])} px, {case['precision']}",
            f"{case['models']['converted']['speedup']:.2f}×",
        ]
        for case in (results["cases"] if results else ())
        if "speedup" in case["models"].get("converted", {})
    ]
    return rows or [["speed-up", _not_measured("bench", run)]]


def _check(results: dict | None, run: Path) -> str:
    if results is None:
        return _not_measured("export", run)
    outcome = "passed" if results["passed"] else "FAILED"
    if results.get("bounds"):
        near = ", ".join(f"{name} {results['figures'][name]:.4f}" for name in results["bounds"])
        return f"{outcome}, {results['precision']}: {near} against float32"
    return f"{outcome}, {percent(results['agreement'], 2)} agreement with torch"
