"""The rooms: imports run one way between folders, heavy libraries stay where they belong, and no file but its own
knows a method by name. docs/ARCHITECTURE.md says what each room is for."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tosa_convert
from tosa_convert.base import discovery

ROOT = Path(tosa_convert.__file__).parent
FILES = {path.relative_to(ROOT).with_suffix("").as_posix(): path for path in ROOT.rglob("*.py")}
ROOMS = [
    "base",
    "methods",
    "config",
    "models",
    "data",
    "tasks",
    "selective",
    "runs",
    "export",
    "training",
    "measure",
    "planning",
    "reporting",
    "workflows",
    "cli",
]
"""Lowest first: a room imports itself and those before it."""
METHODS = ("methods/scores", "methods/bypasses", "methods/schedules", "methods/published")


def imports(name: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def users(library: str) -> set[str]:
    return {name for name in FILES if any(part.split(".")[0] == library for part in imports(name))}


def rooms_of(parts: set[str]) -> set[str]:
    return {part.split(".")[1] for part in parts if part.startswith("tosa_convert.")} & set(ROOMS)


def test_every_file_is_in_a_room():
    assert {name.split("/")[0] for name in FILES if "/" in name} == set(ROOMS)
    assert {name for name in FILES if "/" not in name} == {"__init__", "__main__"}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way_between_rooms(room):
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    for name in FILES:
        if name.startswith(f"{room}/"):
            assert rooms_of(imports(name)) <= allowed, name


def test_heavy_libraries_stay_in_their_rooms():
    assert {name.split("/")[0] for name in users("typer")} == {"cli"}
    assert users("fvcore") == {"measure/macs"}
    assert {name.split("/")[0] for name in users("onnx") | users("onnxruntime") | users("onnxscript")} == {"export"}
    assert users("matplotlib") == {"reporting/plots"}
    assert users("accelerate") <= {"training/engine", "base/distributed"}
    assert {name.split("/")[0] for name in users("transformers") | users("timm")} <= {
        "models",
        "data",
        "runs",
        "training",
    }


def test_adapters_know_no_method():
    for name in FILES:
        if name.startswith("models/"):
            ours = {part for part in imports(name) if part.startswith("tosa_convert.methods")}
            assert all(part.startswith("tosa_convert.methods.token_ops") for part in ours), (name, ours)


def named_parts() -> set[str]:
    return {name for folder in METHODS for name in discovery.names(folder)}


def compared_strings(tree: ast.AST) -> set[str]:
    """Strings that something is compared with: ==, in a row of them, or a case of a match."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            sides = [node.value]
        else:
            continue
        for side in sides:
            parts = side.elts if isinstance(side, (ast.Tuple, ast.List, ast.Set)) else [side]
            found |= {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}
    return found


def test_no_file_but_its_own_compares_with_the_name_of_a_method():
    # "all" is also what rows=all is called, and "norm" a kind of module.
    names = named_parts() - {"all"}
    for name, path in FILES.items():
        if not name.startswith((*METHODS, "models/")):  # models/ knows attention by its module's name
            assert not compared_strings(ast.parse(path.read_text())) & names, name


def test_files_are_read_in_one_sitting():
    long = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    assert {name: lines for name, lines in long.items() if lines > 350} == {}


def test_nothing_is_made_in_inference_mode():
    """transformers keeps some of what one model made first for all later ones, which could not be trained then."""
    assert not [name for name, path in FILES.items() if "inference_mode()" in path.read_text()]


def test_no_package_file_hides_code():
    for name, path in FILES.items():
        if name.endswith("__init__") and name != "__init__":
            assert not path.read_text().strip(), name


def test_the_command_line_starts_without_torch():
    code = "import sys, tosa_convert.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_verbs_are_what_they_say():
    for name in tosa_convert.__all__:
        value = getattr(tosa_convert, name)
        assert value is not None
        if callable(value):
            assert value.__doc__, name
