"""Results as tables, the same ones on the terminal and in a run's report.md."""

from pathlib import Path

from tosa_convert.base.files import read_json
from tosa_convert.reporting.export_tables import export_table
from tosa_convert.reporting.figures import broken_notes, figure, pixels
from tosa_convert.reporting.table import Table, mega, milliseconds, percent
from tosa_convert.runs.metrics_log import read_metrics
from tosa_convert.tasks.task import every_metric

KEEPS_ALL = "every patch reaches the threshold, so none is skipped; raise it"


def training_table(results: dict) -> Table:
    """What a distill or finetune stage ended with."""
    cost = results["flops"]
    figures = [
        [name, percent(value) if name == "overlap" else f"{value:.4f}" if abs(value) >= 1e-3 else f"{value:.2g}"]
        for name, value in results.items()
        if isinstance(value, float)
    ]
    rows = [
        ["steps", str(results["steps"])],
        ["images seen", str(results.get("images", results.get("pictures")))],
        *figures,
        *_cost_rows(cost),
    ]
    notes = broken_notes(results["broken"])
    if "overlap" in results:
        notes.append("overlap: share of selected patches that the attention itself would select; by chance: the ratio")
    notes += _cost_notes(cost)
    return Table(f"{results['stage']} → {results['run']}", ["", "value"], rows, notes)


def convert_table(results: dict) -> Table:
    """What a conversion without training costs."""
    return Table(
        f"convert → {results['run']}", ["", "value"], _cost_rows(results["flops"]), _cost_notes(results["flops"])
    )


def _cost_rows(cost: dict) -> list[list[str]]:
    return [
        ["MACs, original", mega(cost["original"])],
        ["MACs, converted", mega(cost["macs"])],
        ["saved", percent(cost["saved"])],
        ["saved excluding selector cost", percent(cost["saved_without_selectors"])],
    ]


def _cost_notes(cost: dict) -> list[str]:
    notes = _image_notes(cost)
    if cost["selectors"] and cost["saved"] <= 0:
        notes.append("the selectors cost more than they save; try a lower --ratio or a higher --threshold")
    return notes


def _image_notes(cost: dict) -> list[str]:
    """How the multiply–adds differ from image to image, if they do."""
    if not cost.get("images"):
        return []
    over = f"means over {cost['images']} images" + (f" of {cost['data']}" if "data" in cost else "")
    if cost["least"] == cost["most"]:
        return [f"{over}, which all take the same{_extreme(cost)}"]
    least, most = (percent(cost[name] / cost["original"]) for name in ("least", "most"))
    return [f"{over}; one image takes {least} to {most} of the original"]


def _extreme(cost: dict) -> str:
    """Why thresholds make no difference, where every patch reaches them or none."""
    if cost.get("fewest") is None:
        return ""
    if min(layer["tokens"] for layer in cost["layers"]) == cost["patches"]:
        return f": {KEEPS_ALL}"
    if cost["macs"] == cost["fewest"]:
        return ": no patch reaches the threshold, so the fewest possible are kept; lower it"
    return ""


def flops_table(cost: dict, source: str) -> Table:
    """Multiply–adds per layer, and in sum, original against converted."""
    rows = [
        [
            str(layer["layer"]),
            f"{layer['tokens']:g}",
            mega(layer["macs"]),
            percent(layer["macs"] / cost["macs"]),
            mega(layer["selector"]) if layer["selector"] else "",
            mega(layer["original"]),
        ]
        for layer in cost["layers"]
    ]
    in_layers = sum(layer["macs"] for layer in cost["layers"])
    before_layers = sum(layer["original"] for layer in cost["layers"])
    outside = cost["macs"] - in_layers
    rows.append(
        ["other", "", mega(outside), percent(outside / cost["macs"]), "", mega(cost["original"] - before_layers)]
    )
    rows.append(
        [
            "all",
            "",
            mega(cost["macs"]),
            "100 %",
            mega(cost["selectors"]) if cost["selectors"] else "",
            mega(cost["original"]),
        ]
    )
    notes = []
    if cost["macs"] != cost["original"]:
        notes.append(
            f"{percent(cost['saved'])} saved; {percent(cost['saved_without_selectors'])} excluding selector cost"
        )
    notes += _cost_notes(cost)
    uncounted = ", ".join(
        f"{name.removeprefix('aten::')} ×{count}" for name, count in sorted(cost["uncounted"].items())
    )
    notes.append(f"multiply–adds of one image{uncounted and f'; operators not counted: {uncounted}'}")
    if "plot" in cost:
        notes.append(f"plot: {cost['plot']}")
    height, width = cost["size"]
    columns = ["layer", "patches", "MACs", "share", "of it selector", "original"]
    return Table(f"{source} at {height}×{width}", columns, rows, notes)


MOST_COLUMNS = 5
FAR = 0.03
"""Share of the MACs from which on other images are said to be other than those that a run was made on."""


def _these_images_notes(results: dict) -> list[str]:
    """What these images take, where each keeps as many tokens as it needs."""
    if "macs" not in results:
        return []
    (mean, least, most), before = results["macs"].values(), results["macs_before"]
    of = "crops of them" if results.get("macs_crops") else "of these images"
    over = f" over {results['macs_over']} {of}" if "macs_over" in results else ""  # 0.2.0 did not note it
    notes = [
        f"MACs: {percent(mean)} of the original on average{over}, {percent(least)} to {percent(most)} of single ones"
    ]
    if least >= 1:
        notes.append("the threshold saves nothing on any of these images; raise it, or finetune with --mean-macs")
    if before is not None and abs(mean - before) > FAR:
        again = (
            "finetune the run on images like these with --mean-macs, which sets the thresholds again"
            if results.get("macs_learnt")
            else "plan on images like these, or bound each with --max-macs"
        )
        notes.append(f"these images differ from those that it was made on, which take {percent(before)}; {again}")
    return notes


def eval_table(results: dict) -> Table:
    figures = list(next(iter(results["models"].values())))
    rows = [[name, *(figure(key, values[key], 2) for key in figures)] for name, values in results["models"].items()]
    notes = broken_notes(results["broken"])
    if results.get("unknown"):
        notes.append(f"left out of the metrics, since nothing is known in their maps: {results['unknown']} images")
    if "predictions" in results:
        notes.append(f"wrote {results['predictions']['files']} maps to {results['predictions']['folder']}")
    notes += _these_images_notes(results)
    if "agreement" in figures:
        notes.append(
            "agreement, cosine: with the original; agreement: same top-1, of "
            "embeddings the same nearest image, without a head a cosine above 0.999"
        )
    titles = [every_metric()[key].title if key in every_metric() else key for key in figures]
    title = f"{results['images']} images of {results['data']}"
    if len(figures) > MOST_COLUMNS:  # a line each
        names, *columns = zip(*rows, strict=True)
        return Table(title, ["", *names], [[each, *cells] for each, cells in zip(titles, columns, strict=True)], notes)
    return Table(title, ["", *titles], rows, notes)


def bench_table(results: dict) -> Table:
    """Milliseconds, measured and ideal speed-up, and peak memory, per case and model."""
    rows, notes = [], [*results["notes"]]
    settings, machine = results["settings"], results["machine"]
    cases = [_conditions(case) for case in results["cases"]]
    common, varying = {}, {}  # what all cases share is in the title, to keep the table narrow
    for name in cases[0] if cases else ():
        values = {conditions[name] for conditions in cases}
        (varying if len(values) > 1 else common)[name] = values
    for case, conditions in zip(results["cases"], cases, strict=True):
        place = [conditions[name] for name in varying]
        where = f"({conditions['runtime']}, batch {conditions['batch']}, {conditions['px']} px)"
        for name, figures in case["models"].items():
            low, high = figures["ms_quartiles"]
            row = [*place, name, milliseconds(figures["ms"]), f"{milliseconds(low)}–{milliseconds(high)}"]
            if "speedup" in figures:
                row += [f"{figures['speedup']:.2f}×", f"{figures['ideal']:.2f}×", percent(figures["reached"], 0)]
                if figures["speedup"] <= 1:
                    notes.append(f"{name}: no gain at this size {where}")
                elif figures["speedup_quartiles"][0] <= 1:
                    notes.append(f"{name}: the gain is within the spread {where}; more --rounds would tell")
            else:
                row += ["", "", ""]
            rows.append([*row, "" if figures["memory"] is None else f"{figures['memory'] / 2**20:.0f}"])
    notes.append(
        f"ms per forward pass: median and quartiles of {_rounds(results)}, models in turn, "
        f"{settings['threads']} thread(s), "
        f"{machine.get('gpu') or machine['cpu']}, torch {machine['torch']}, onnxruntime {machine['onnxruntime']}"
    )
    notes.append("ideal: speed-up expected from MACs, excluding selector cost; of ideal: share of it that is measured")
    columns = [*varying, "model", "ms", "quartiles", "speed-up", "ideal", "of ideal"]
    if settings["memory"]:
        notes.append("MiB: peak memory, weights and activations")
        columns.append("MiB")
    else:
        rows = [row[:-1] for row in rows]
    shared = ", ".join(WRITTEN[name].format(*values) for name, values in common.items())
    return Table(f"Speed against {results['reference']}{shared and f': {shared}'}", columns, rows, notes)


def _rounds(results: dict) -> str:
    """How often was timed; results of before do not say it case by case."""
    made = {
        (case.get("rounds", results["settings"]["rounds"]), case.get("images") is not None) for case in results["cases"]
    }
    written = [f"{rounds} {'passes over the images' if real else 'rounds'}" for rounds, real in sorted(made)]
    return " or ".join(written) or f"{results['settings']['rounds']} rounds"


WRITTEN = {"runtime": "{}", "batch": "batch {}", "px": "{} px", "type": "{}"}
"""Conditions of a benchmark, as the title gives those that all cases share."""


def _conditions(case: dict) -> dict[str, str]:
    """What a case was timed under, by the name of its column."""
    return {
        "runtime": case["runtime"],
        "batch": str(case["batch_size"]),
        "px": pixels(case["size"]),
        "type": case["precision"],
    }


def examine_table(results: dict) -> Table:
    """How a model is recognised, and what was proven of it."""
    found = [
        ["class", results["class"]],
        ["recognised", results["recognised"]],
        ["layers", str(results["layers"])],
        ["heads", str(results["heads"])],
        ["prefix tokens", str(results["prefix"])],
        ["patches", "×".join(map(str, results["patches"]))],
    ]
    notes = [f"proven: {proof}" for proof in results["proofs"]]
    if results["structure"]:
        where = ("row", "norm", "attention", "mlp")
        found += [[name, str(results["structure"][name])] for name in where]
        notes.append(f"in {results['seconds']['proof']:.1f} s")
    return Table(f"{results['model']} can be converted", ["", "value"], found, notes)


def show_table(results: dict) -> Table:
    rows = [[f"layer {layer}", percent(share)] for layer, share in results["attended"].items()]
    rows += [
        [f"MACs of {name}", percent(share)] for name, share in zip(results["images"], results["macs"], strict=False)
    ]
    notes = [f"images: {', '.join(results['images'])}; plot: {results['plot']}"]
    if results["macs"] and min(results["attended"].values()) == 1:
        notes.append(KEEPS_ALL)
    if not rows:  # a dense model that is not converted
        return Table("Maps", ["image"], [[name] for name in results["images"]], [f"plot: {results['plot']}"])
    return Table("Patches that attend", ["", "attend"], rows, notes)


def features_table(results: dict) -> Table:
    shapes = [[name, " × ".join(map(str, results[name]))] for name in ("patches", "classes") if results[name]]
    rows = [["images", str(results["images"])], *shapes]
    return Table(results["file"], ["", "shape"], rows, broken_notes(results["broken"]))


def doctor_table(results: dict) -> Table:
    """What a machine can do."""
    rows = [[name, found["value"]] for name, found in results.items()]
    notes = [f"{name}: {found['advice']}" for name, found in results.items() if found["advice"]]
    return Table("This machine", ["", "found"], rows, notes, left=True)


def report_table(results: dict) -> Table:
    return Table("Report", ["", "file"], [[results["run"], results["file"]]], [])


def tables_of(run: Path) -> list[Table]:
    """All tables of a run, from its ``config.json``, ``metrics.jsonl`` and ``bench.json``."""
    results = read_json(run / "config.json").get("results")  # a run saved from Python has none
    first = convert_table if results and results["stage"] == "convert" else training_table
    tables = [first(results), flops_table(results["flops"], run.name)] if results else []
    latest = {line["stage"]: line for line in read_metrics(run)}
    if "eval" in latest:
        tables.append(eval_table(latest["eval"]))
    if "export" in latest:
        tables.append(export_table(latest["export"]))
    if (run / "bench.json").exists():
        tables.append(bench_table(read_json(run / "bench.json")))
    return tables
