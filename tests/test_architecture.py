"""Imports run downward only, and the heavy libraries stay in their rooms."""

import ast
from pathlib import Path

import tosa_convert

ROOT = Path(tosa_convert.__file__).parent
FILES = {path.relative_to(ROOT).with_suffix("").as_posix(): path for path in ROOT.rglob("*.py")}


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


def test_heavy_libraries_stay_in_their_rooms():
    assert users("typer") == {"cli", "cli_bench", "cli_look", "cli_options", "cli_plan", "cli_recipes"}
    assert users("fvcore") == {"macs"}
    assert users("onnx") | users("onnxruntime") | users("onnxscript") == {"export", "onnx_check", "runtimes"}
    assert users("matplotlib") == {"pictures"}
    assert users("accelerate") <= {"train", "processes"}
    assert users("transformers") <= {"loading", "origin"}


def test_tokens_and_scores_know_no_model_library():
    for name in FILES:
        low = ("tokens", "matching", "passage", "selective", "methods", "config")
        if name.startswith(("scores/", "bypasses/")) or name in low:
            for part in imports(name):
                assert part.split(".")[0] not in ("timm", "transformers"), (name, part)
                assert not part.startswith("tosa_convert.hosts"), (name, part)


def test_hosts_know_no_method():
    for name in FILES:
        if name.startswith("hosts/"):
            ours = {part for part in imports(name) if part.startswith("tosa_convert")}
            allowed = tuple(f"tosa_convert.{name}" for name in ("errors", "hosts", "preprocessing", "tokens"))
            assert all(part.startswith(allowed) for part in ours), (name, ours)


def test_files_are_read_in_one_sitting():
    long = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    assert {name for name, lines in long.items() if lines > 400} == set()


def test_names_that_are_spelt_out_twice_are_the_same():
    """The command line and the config do not import what they name: they start without torch."""
    from typing import get_args

    from tosa_convert import bypasses, cli_options, config, methods

    assert set(config.LASTING) == set(bypasses.LASTING)
    assert set(get_args(config.Bypass)) == {*bypasses.WHOLE, *bypasses.LASTING}
    for name in ("Score", "Bypass", "Schedule"):
        assert tuple(getattr(cli_options, name)) == get_args(getattr(config, name))
    assert list(cli_options.Method) == list(methods.METHODS)


def test_public_verbs_are_what_they_say():
    for name in tosa_convert.__all__:
        value = getattr(tosa_convert, name)
        assert value is not None
        if callable(value):
            assert value.__doc__, name
