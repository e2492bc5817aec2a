"""Every figure in README and docs was recorded: it stands in a file of benchmarks/results, or follows from one."""

import itertools
import json
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = {path.name: path for path in (ROOT / "benchmarks" / "results").iterdir()}
PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "docs" / "figures").glob("*.md"))}
FIGURES = "\n".join(PAGES.values()) + (ROOT / "docs" / "figures.md").read_text()
HEADING = re.compile(r"^##? (.+)$", re.M)
SECTIONS = {
    f"{page}: {title}": text
    for page, content in PAGES.items()
    for title, text in zip(HEADING.findall(content), HEADING.split(content)[2::2], strict=True)
    if text.strip()
}
NUMBER = re.compile(r"(?<![\w.])(\d[\d,]*\.\d+|\d[\d,]*(?= ?[%×]))( ?[%×])?")
"""A number with decimals, a percentage or a factor; whole numbers are settings."""
TOGETHER = [
    (r"\| 0\.\d\d \| [^|]+ \| ([\d.]+) \| ([\d.]+ %) \| ([\d.]+ %) \|", ("macs", "before", "top1"), "cifar10"),
    (r"([\d.]+×) / (\d+ %)", ("speedup", "of_promised"), "cifar10"),
    (r"\| [A-Za-z][^|]* \| ([\d.]+ %) \| ([\d.]+ %) \| ([\d.]+ %) \|", ("macs", "before", "top1"), "fashion_trained"),
]
"""Cells of a row of a table, and under which names they stand in one row of a file that begins so."""


def numbers_in(text: str) -> list[str]:
    """Those outside of code, links, numbers of papers and names of versions, with the sign that follows them."""
    plain = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|\d{4}\.\d{5}", " ", text, flags=re.S)
    return ["".join(found).replace(",", "").replace(" ", "") for found in NUMBER.findall(plain)]


def values_in(content: object) -> list[float]:
    """All numbers of a JSON file."""
    if isinstance(content, dict):
        named = [float(key) for key in content if re.fullmatch(r"[\d.]+", key)]
        return named + [value for each in content.values() for value in values_in(each)]
    if isinstance(content, list):
        return [value for each in content for value in values_in(each)]
    if isinstance(content, str):
        return [float(number) for number in re.findall(r"\d+\.\d+", content)]
    return [] if isinstance(content, bool) or content is None else [float(content)]


def derived(content: dict) -> list[float]:
    """What is said of a file's figures beside them: gains and losses in top-1, means and spreads over seeds, errors as
    a share of a rival's."""
    values = []
    if isinstance(content.get("results"), dict) and "top1" in content["results"]:
        top1, macs = content["results"]["top1"], content["results"]["macs"]
        values += [one - other for one, other in itertools.permutations(top1.values(), 2)]
        values += [each / macs["original"] for each in macs.values()]
    values += [row["original"] - row["top1"] for row in content.get("rows", []) if {"original", "top1"} <= row.keys()]
    trained = [row["top1"] for row in content.get("rows", []) if row.get("method") == "original"]
    values += [one - row["top1"] for one in trained for row in content["rows"] if "top1" in row]
    seeds: dict = {}
    for row in content.get("rows", []):
        if {"method", "budget", "seed", "top1"} <= row.keys():
            seeds.setdefault((row["method"], row["budget"], row.get("precision")), []).append(row["top1"])
    means = [statistics.mean(found) for found in seeds.values() if len(found) > 1]
    values += [*means, *(one - other for one, other in itertools.permutations(means, 2))]
    values += [max(found) - min(found) for found in seeds.values() if len(found) > 1]
    methods = {
        (row["method"], row["budget"]): row for row in content.get("rows", []) if {"patch", "method"} <= row.keys()
    }
    for (_, budget), row in methods.items():
        for name in ("tome", "mpm", "mctf", "similarity/merge"):
            rival = methods.get((name, budget), row)
            values += [(1 - row[key]) / (1 - rival[key]) for key in ("patch", "class") if key in row]
    return values


def is_rounded(number: str, value: float) -> bool:
    """Whether the number is the value: a factor as it is, a percentage as the share or what is missing of it; what has
    no sign as it is, in millions, billions or MiB, as a share or what is missing of it, or in points. A loss is written
    with a sign of its own."""
    digits, sign, value = number.rstrip("%×"), number[-1], abs(value)
    half = 0.5 * 10 ** -len(digits.partition(".")[2]) + 1e-9
    forms = {"×": (value,), "%": (100 * value, 100 * (1 - value))}.get(
        sign, (value, 100 * value, 1 - value, value / 1e6, value / 1e9, value / 2**20)
    )
    return any(abs(form - float(digits)) <= half for form in forms)


def unknown_numbers(text: str, values: list[float], written: list[float]) -> list[str]:
    """Those that are none of the values, nor are written elsewhere in whatever form."""
    return [
        number
        for number in numbers_in(text)
        if not any(is_rounded(number, value) for value in values)
        and not any(is_rounded(number.rstrip("%×"), value) for value in written)
    ]


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_of_figures_stands_in_its_results(section):
    text = SECTIONS[section]
    names = [name for name in re.findall(r"`(\w+\.(?:json|log))`", text) if name in RESULTS]
    assert names, "the section does not say where it was recorded"
    scripts = [ROOT / "benchmarks" / name for name in re.findall(r"benchmarks/(\w+\.py)", text)]
    values, written = [1.0], []
    for path in [*scripts, *(RESULTS[name] for name in names if name.endswith(".log"))]:
        written += [float(number) for number in re.findall(r"\d+\.?\d*", path.read_text())]  # settings, or a log
    for name in names:
        if name.endswith(".json"):
            content = json.loads(RESULTS[name].read_text())
            values += values_in(content) + derived(content)
    assert unknown_numbers(text, values, written) == []


@pytest.mark.parametrize(("pattern", "names", "files"), TOGETHER)
def test_cells_of_a_row_stand_together_in_a_row_of_a_file(pattern, names, files):
    contents = [json.loads(path.read_text()) for name, path in RESULTS.items() if name.startswith(files)]
    rows = [row for content in contents for row in content["rows"] if set(names) <= row.keys()]
    page = PAGES["cifar10" if files == "cifar10" else "quickstart"]
    found = [[cell.replace(" ", "") for cell in cells] for cells in re.findall(pattern, page)]
    assert len(found) > 5
    missing = [
        cells
        for cells in found
        if not any(all(is_rounded(cell, row[name]) for cell, name in zip(cells, names, strict=True)) for row in rows)
    ]
    assert missing == []


@pytest.mark.parametrize(
    "name", ["README.md", "docs/faq.md", "docs/methods.md", "docs/guide.md", "docs/dense.md", "docs/deploy.md"]
)
def test_other_pages_quote_the_figures(name):
    """Each number is on a page of figures, or a setting in the code examples of the page itself."""
    text = (ROOT / name).read_text()
    settings = re.findall(r"\d+\.\d+", " ".join(re.findall(r"```.*?```|`[^`]*`", text, flags=re.S)))
    written = [float(number.rstrip("%×")) for number in [*numbers_in(FIGURES), *settings, "0.99", "0.8"]]
    assert unknown_numbers(text, [], written) == []


def test_every_result_is_told():
    told = set(re.findall(r"`(\w+\.(?:json|log))`", FIGURES))
    assert set(RESULTS) - told == set()
