"""What a command line's values are checked for; one mistake has one message, whatever the command."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

import typer

from tosa_convert.base.errors import UsageError


def at_least(least: int) -> Callable:
    """A callback for an option whose number must not be smaller."""

    def check(option: typer.CallbackParam, number: int | None) -> int | None:
        if number is not None:
            _check(number, least, option.opts[0])
        return number

    return check


def numbers(text: str, kind: type, option: str, least: int | None = None) -> list:
    """An option's comma-separated numbers."""
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        example = "2,4,6" if kind is int else "0.8 or 0.9,0.8,0.7"
        raise UsageError(f"{option} {text!r} is not a list of numbers; write it like {example}") from None
    for number in found if least is not None else ():
        _check(number, least, option)
    return found


def whole_number(text: str, option: str, least: int) -> int:
    """An option's one number."""
    found = numbers(text, int, option, least)
    if len(found) != 1:
        raise UsageError(f"{option} takes one number here, such as {found[0]}, not a list")
    return found[0]


def image_size(text: str) -> int | tuple[int, int]:
    """An image's side, or its height and width: 224, or 352x1120."""
    try:
        found = [int(part) for part in str(text).lower().split("x")]
    except ValueError:
        found = []
    if len(found) not in (1, 2):
        raise UsageError(f"--img-size {text!r} is not a size; write it like 224, or 352x1120, height × width")
    for side in found:
        _check(side, 1, "--img-size")
    return found[0] if len(found) == 1 else (found[0], found[1])


def names(text: str) -> list[str]:
    """An option's comma-separated names."""
    return [name.strip() for name in text.split(",")]


def check_png(file: Path, option: str) -> None:
    """Before the work: a plot is written as PNG."""
    if file.suffix != ".png":
        raise UsageError(f"{option} {file.name} is not a .png file; give a name that ends in .png")


def plain(options: dict) -> dict:
    """The options that were given, enumerations and paths as text."""
    found = {name: value for name, value in options.items() if value is not None}
    return {name: str(value) if isinstance(value, (Path, StrEnum)) else value for name, value in found.items()}


def _check(number: int, least: int, option: str) -> None:
    if number < least:
        raise UsageError(f"{option} {number} is out of range; give {least} or more")
