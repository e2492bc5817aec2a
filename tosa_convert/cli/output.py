"""What the commands print: results on stdout, remarks on stderr, one process speaking for all."""

import contextlib
import json
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text


def bar(as_json: bool):
    from tosa_convert.base import distributed as processes
    from tosa_convert.base.progress import Progress

    return Progress(shown=processes.is_main() and not as_json)


def say(text: str) -> None:
    from tosa_convert.base import distributed as processes

    if not processes.is_main():
        return
    Console(stderr=True).print(Text(text, "dim"), soft_wrap=True)


def say_data(plan) -> None:
    if plan.data.train is None:
        say("no --data given: trained on the small built-in set of public-domain photos")


def show(results: dict, table: str, as_json: bool, *arguments) -> None:
    from tosa_convert.base import distributed as processes
    from tosa_convert.reporting import export_tables, plan_tables, result_tables

    if not processes.is_main():
        return
    if as_json:
        print_json(results)
    else:
        modules = (result_tables, export_tables, plan_tables)
        make = next(getattr(module, table) for module in modules if hasattr(module, table))
        make(results, *arguments).print(Console())


@contextlib.contextmanager
def failures_shown(as_json: bool) -> Iterator[None]:
    """Of a file that fails its check all that was found is shown, above the error."""
    from tosa_convert.export.onnx import FailedCheckError

    try:
        yield
    except FailedCheckError as error:
        show(error.results, "export_table", as_json)
        raise


def print_json(content) -> None:
    print(json.dumps(content, indent=2))
