"""What a plan is and what there was to choose from, as tables."""

from tosa_convert.config.conversion import ConvertConfig
from tosa_convert.reporting.result_tables import figure
from tosa_convert.reporting.table import Table, milliseconds, percent
from tosa_convert.tasks.task import every_metric


def plan_table(results: dict) -> Table:
    """What a plan is, what was predicted and what measured."""
    config, plan = results["convert"], results["plan"]
    rows = [
        ["keeps", plan["keep"]],
        ["score × bypass", f"{config['score']} × {config['bypass']}"],
        [*_by_layer(config)],
        *_spread_rows(plan),
        [f"share of the {PRICED[plan['by']]}, predicted", percent(plan["cost"])],
        ["share of the MACs, counted", percent(results["macs"])],
        *_latency_rows(results["latency"]),
        ["drop (of the map)" if plan["keep"] == "map" else "drop (top-1, agreement or cosine)", f"{plan['drop']:.5f}"],
        ["error, measured", f"{plan['measured']:.5f}"],
        *([name, f"{value:.5f}"] for name, value in _fidelity(results)),
    ]
    latency = results["latency"]
    if latency and not latency["met"]:
        notes = [
            f"NOT within 5 % of the {milliseconds(latency['asked'])} ms asked for: this is the best that was found"
        ]
    else:
        notes = []
    notes += [f"error of {name} at the same budget: {value:.5f}" for name, value in plan["rivals"].items()]
    weighed = "" if plan.get("spread") else "; images with large errors count less"
    notes.append(f"{plan['images']} images of {results['data']}; error of what is kept: {_error(results)}{weighed}")
    if "as many tokens as each image needs" in plan["rivals"]:
        notes.append(
            "on these images thresholds gain nothing clear over numbers of tokens, so the plan has numbers; more "
            "--images may show a small gain"
        )
    notes.append(f"recipe: {results['recipe']} (tosa-convert run {results['recipe']}); plot: {results['plot']}")
    return Table(f"Plan for {results['source']}", ["", "value"], rows, notes)


def _latency_rows(latency: dict | None) -> list[list[str]]:
    """What was measured of a plan for a latency."""
    if not latency:
        return []
    plan, asked, before = (milliseconds(latency[name]) for name in ("plan", "asked", "original"))
    return [
        ["share of the latency, measured", percent(latency["share"])],
        ["ms, measured", f"{plan} (asked {asked}, original {before}; {latency['conditions']})"],
    ]


def _spread_rows(plan: dict) -> list[list[str]]:
    """How the multiply–adds differ from image to image, if they do."""
    spread = plan.get("spread")
    if not spread:
        return []
    mean, deviation, least, most, bound = (percent(spread[name]) for name in SPREAD)
    return [
        ["MACs of single images", f"{least} to {most}, mean {mean}, deviation {deviation}"],
        ["MACs of any image, at most", bound],
    ]


SPREAD = ("mean", "deviation", "least", "most", "bound")

ERRORS = {
    "logits": "1 − cosine of the features that the logits are made from (their KL where there are none)",
    "patches": "1 − cosine of the patch tokens, plus that of the class token",
    "pooled": "1 − cosine of the pooled features or the embedding",
}
"""What a plan makes small, by what it keeps."""
PRICED = {"macs": "MACs", "latency": "latency"}
FIDELITY = {"patch": "patch cos", "class": "class cos", "pooled": "pooled cos", "agreement": "agree"}


def _error(results: dict) -> str:
    """What the plan makes small; of a map its task says."""
    return results.get("error_is") or ERRORS[results["plan"]["keep"]]


def _by_layer(config: dict) -> list[str]:
    name = "ratio" if config.get("threshold") is None else "threshold"
    each = ", ".join(f"{layers}: {value:.4g}" for layers, value in _shared(config, name))
    return [f"{name}s by layer", each]


def _shared(config: dict, name: str) -> list[tuple[str, float]]:
    """Layers that share a choice, such as 3–5, and their ratio or threshold."""
    given = config[name] if isinstance(config[name], list) else [config[name]] * len(config["layers"])
    ratios = dict(zip(config["layers"], given, strict=True))
    segments = ConvertConfig(**config).segments(config["layers"])
    ends = [(str(layers[0]), str(layers[-1])) for layers in segments]
    return [("–".join(dict.fromkeys(pair)), ratios[int(pair[0])]) for pair in ends]


def _fidelity(figures: dict) -> list[tuple[str, float]]:
    return [(title, figures[name]) for name, title in _titles().items() if name in figures]


def _titles() -> dict[str, str]:
    """Of all that is measured of a model: how close it is to the original, and how well it does its task."""
    return FIDELITY | {name: metric.title for name, metric in every_metric().items() if metric.brief}


def compare_table(results: dict) -> Table:
    """Methods at the same budgets."""
    kinds = [name for name in _titles() if any(name in row for row in results["rows"])]
    timed = "ms" in results["original"]
    rows = []
    for row in [{"method": "original", "budget": None, **results["original"], "macs": 1.0}, *results["rows"]]:
        cells = ["" if row["budget"] is None else f"{row['budget']:g}", row["method"], f"{row['macs']:.3f}"]
        cells += [figure(name, row[name]) if name in row else "–" for name in kinds]
        cells += [milliseconds(row["ms"]), f"{row['speedup']:.2f}×" if "speedup" in row else ""] if timed else []
        rows.append(cells)
    rows[1:] = sorted(rows[1:], key=lambda cells: -float(cells[0]))  # the sort is stable: methods keep their order
    notes = [*results["notes"]]
    timing = f"; ms: {results['runtime']}, batch 1, one thread, in turn; speed: against the original" if timed else ""
    agree = "; agree: same top-1 as the original, of embeddings the same nearest other image"
    notes.append(f"patch cos, class cos: cosine to the original's tokens{agree if 'agreement' in kinds else ''}")
    trained = "no other training" if results["distill_steps"] else "no training"
    notes.append(f"{results['images']} images of {results['data']}, {trained}; MACs include token selection{timing}")
    shown = [_titles()[name] for name in kinds]
    columns = ["budget", "method", "MACs", *shown, *(["ms", "speed"] if timed else [])]
    return Table("Methods at the same budgets", columns, rows, notes)
