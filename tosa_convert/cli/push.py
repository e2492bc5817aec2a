"""The push command."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from tosa_convert.cli.options import Json
from tosa_convert.cli.output import print_json, say


def push(
    run: Annotated[Path, typer.Argument(help="folder of a finished run")],
    name: Annotated[str, typer.Argument(help="ORG/NAME on the Hugging Face hub")],
    private: Annotated[bool, typer.Option(help="only its owners see it, where it is new")] = True,
    yes: Annotated[bool, typer.Option("--yes", help="replace files that are there without asking")] = False,
    as_json: Json = False,
) -> None:
    """Put a run on the Hugging Face hub, private unless --no-private is given. `load("hf:ORG/NAME")` opens it."""
    from tosa_convert.runs.hub import push as put

    def may_overwrite(names: list[str]) -> bool:
        if yes or as_json or not sys.stdin.isatty():
            return yes
        return typer.confirm(f"{name} holds {', '.join(names)} already; replace them?", err=True)

    address = put(run, name, private=private, may_overwrite=may_overwrite)
    if as_json:
        print_json({"run": str(run), "address": address})
    else:
        say(f'pushed to {address}; open it with tosa_convert.load("hf:{name}")')
