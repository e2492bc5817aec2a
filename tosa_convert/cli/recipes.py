"""tosa-convert recipes: list, copy and check recipes."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tosa_convert.base.errors import UsageError
from tosa_convert.cli.options import Json
from tosa_convert.cli.output import print_json, say

recipes_app = typer.Typer(no_args_is_help=True, help="List, copy and check recipes.")


@recipes_app.command("ls")
def recipes_ls(as_json: Json = False) -> None:
    """List the built-in recipes."""
    from tosa_convert.config.recipe import recipes_folder
    from tosa_convert.reporting.table import Table

    rows = [
        [path.stem, path.read_text().splitlines()[0].lstrip("# ")] for path in sorted(recipes_folder().glob("*.yaml"))
    ]
    if as_json:
        print_json(dict(rows))
    else:
        Table("Recipes", ["name", "what"], rows, [], left=True).print(Console())


@recipes_app.command("cp")
def recipes_cp(name: str, to: Annotated[Path | None, typer.Argument(show_default="NAME.yaml here")] = None) -> None:
    """Copy a built-in recipe, to make your own from it."""
    from tosa_convert.base.files import write_text
    from tosa_convert.config.recipe import find_recipe

    found = find_recipe(name)
    target = to or Path(found.name)
    target = target / found.name if target.is_dir() else target
    if target.exists():
        raise UsageError(f"{target} exists already; name another file")
    write_text(target, found.read_text())
    say(f"wrote {target}; run it with: tosa-convert run {target}")


@recipes_app.command("validate")
def recipes_validate(files: list[str]) -> None:
    """Check recipes without running them."""
    from tosa_convert.config.recipe import find_recipe, read_recipe
    from tosa_convert.workflows.recipe_checks import check_recipe

    problems = []
    for name in files:
        try:
            check_recipe(read_recipe(find_recipe(name)))
            say(f"{name}: valid")
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise UsageError("\n".join(problems))
