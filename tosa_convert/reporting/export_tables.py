"""The table of an export: the file against torch, and of fewer bits the chain of models that it comes from."""

from tosa_convert.reporting.figures import broken_notes, figure
from tosa_convert.reporting.table import Table, milliseconds, percent
from tosa_convert.tasks.task import every_metric

NAMES = {"original": "original, float32", "torch": "this model in torch"}


def export_table(results: dict) -> Table:
    if results.get("tried") or results.get("bounds"):
        return _chain_table(results)
    rows = [
        ["images checked", str(results["images"])],
        ["largest difference", f"{results['difference']:.2e}"],
        ["agreement with torch", percent(results["agreement"], 2)],
        *(
            [
                f"{metric.title}, {' / '.join(results[key])}",
                " / ".join(figure(key, v, 2) for v in results[key].values()),
            ]
            for key, metric in every_metric().items()
            if results.get(key)
        ),
        *([f"same tokens, layer {layer}", percent(value, 2)] for layer, value in results["selected"].items()),
        ["check", "passed" if results["passed"] else "FAILED"],
    ]
    notes = [*_elsewhere(results), *broken_notes(results["broken"])]
    return Table(results["file"], ["in ONNX Runtime", "value"], rows, notes)


def _elsewhere(results: dict) -> list[str]:
    """What was found in another runtime, if one was asked for."""
    found = results.get("elsewhere")
    if not found:
        return []
    near = ", ".join(f"{name} {value:.4f}" for name, value in found["figures"].items())
    times = f"{milliseconds(found['ms'])} ms, ONNX Runtime {milliseconds(found['ms_onnx'])} ms"
    return [f"in {found['runtime']}, {found['images']} images: {near} against the model in torch; {times}"]


def _chain_table(results: dict) -> Table:
    """The models from the original in float32 to a file with fewer bits."""
    links = results["chain"]
    known = [key for key in ("ms", "speedup", "bytes") if any(key in link for link in links)]
    figures = [key for key in links[0] if key != "name" and key not in known and _brief(key)]
    written = {"ms": milliseconds, "speedup": "{:.2f}×".format, "bytes": lambda size: f"{size / 1e6:.1f}"}
    titles = {"ms": "ms", "speedup": "speed-up", "bytes": "MB"}

    def cell(link: dict, key: str) -> str:
        if key not in link:
            return ""
        return written[key](link[key]) if key in written else figure(key, link[key], 2 if key == "agreement" else 1)

    rows = [[NAMES.get(link["name"], link["name"]), *(cell(link, key) for key in (*figures, *known))] for link in links]
    near = ", ".join(
        f"{name} {results['figures'][name]:.4f} ({'at most' if name == 'error' else 'at least'} {bound:g})"
        for name, bound in results["bounds"].items()
    )
    worst = "in the worst of the image sizes, " if len(results["sizes"]) > 1 else ""
    notes = [f"{'' if results['passed'] else 'NOT '}near enough to float32: {worst}{near}"] if near else []
    selected = list(results["selected"].values())
    if selected:
        notes.append(
            f"the same tokens as in torch: {percent(min(selected))} in the worst of {len(selected)} layers, "
            f"{percent(sum(selected) / len(selected))} in the mean"
        )
    notes += _slower(results)
    if results["left"]:
        names, more = results["left"][:4], len(results["left"]) - 4
        notes.append(f"left in float: {', '.join(names)}{f' and {more} more operators' if more > 0 else ''}")
    notes += [f"tried {name}: {said}" for name, said in results["tried"].items()]
    before = links[0]["name"] == "original"
    notes.append(f"{results['images']} images; figures against {'the original' if before else 'the model in torch'}")
    return Table(
        f"{results['file']}, {results['precision']}",
        ["", *(titles.get(key) or _title(key) for key in (*figures, *known))],
        rows,
        notes + _elsewhere(results) + broken_notes(results["broken"]),
    )


def _slower(results: dict) -> list[str]:
    """Whether the file that is shipped is slower than the original, or no faster than the same in float32."""
    speeds = {link["name"]: link["speedup"] for link in results["chain"] if "speedup" in link}
    ours, notes = speeds.get(results["precision"]), []
    if ours is None:
        return []
    if "original" in speeds and ours <= 1:
        notes.append("the file is SLOWER here than the original: at this size the conversion does not pay")
    if results["precision"] != "float32" and ours <= speeds["float32"]:
        why = "`tosa-convert doctor` says what the processor can do"
        notes.append(f"{results['precision']} is NO faster here than float32: {why}")
    return notes


def _brief(key: str) -> bool:
    return key not in every_metric() or every_metric()[key].brief


def _title(key: str) -> str:
    return every_metric()[key].title if key in every_metric() else key
