"""The options of a conversion, declared once for every command that has them."""

from enum import StrEnum
from typing import Annotated

import typer

from tosa_convert.base import discovery
from tosa_convert.base.errors import UsageError
from tosa_convert.cli.groups import group
from tosa_convert.cli.parsing import at_least, numbers, plain

Method = StrEnum("Method", discovery.names("methods/published"))
Score = StrEnum("Score", discovery.names("methods/scores"))
Bypass = StrEnum("Bypass", discovery.names("methods/bypasses"))
Schedule = StrEnum("Schedule", discovery.names("methods/schedules"))


class Selection(StrEnum):
    shared = "shared"
    per_head = "per_head"


class CompareBy(StrEnum):
    normed = "normed"
    tokens = "tokens"


class Attention(StrEnum):
    ahead = "ahead"
    precise = "precise"


class _Options:
    """One annotation per option, in the order of --help."""

    layers: Annotated[
        str | None,
        typer.Option(help="selective layers from 1, such as 2,4,6 or 3:0.9,5:0.7", show_default="the schedule's"),
    ]
    ratio: Annotated[
        str | None, typer.Option(help="share of patches that attend, one or one per layer", show_default="0.8")
    ]
    threshold: Annotated[
        str | None,
        typer.Option(
            help="score from which on a patch attends, one or one per layer, in place of a share",
            show_default=False,
        ),
    ]
    method: Annotated[
        Method | None, typer.Option(help="published score, bypass and schedule in one", show_default="tosa")
    ]
    score: Annotated[
        Score | None, typer.Option(help="how tokens are selected; random is the control", show_default="attention")
    ]
    bypass: Annotated[Bypass | None, typer.Option(help="what the other tokens get", show_default="identity")]
    schedule: Annotated[
        Schedule | None, typer.Option(help="which layers, and how the ratio varies over them", show_default="pairs")
    ]
    segment: Annotated[
        str | None,
        typer.Option(help="layers in a row that share one choice, such as 3 or 2,3,3", show_default="1"),
    ]
    selection: Annotated[
        Selection | None, typer.Option(help="one token set per layer, or per head", show_default="shared")
    ]
    container: Annotated[
        int | None,
        typer.Option(
            help="spa's: pack a batch into containers of so many tokens", show_default=False, callback=at_least(1)
        ),
    ]
    windows: Annotated[
        int | None,
        typer.Option(
            help="frequency's: windows of a row and of a column, a mean each", show_default="2", callback=at_least(1)
        ),
    ]
    rows: Annotated[
        str | None, typer.Option(help="query rows that score the tokens, or all (as in the paper)", show_default="32")
    ]
    hidden: Annotated[
        int | None,
        typer.Option(help="channels of the selector", show_default="2 per head", callback=at_least(1)),
    ]
    r: Annotated[
        int | None,
        typer.Option("--r", help="tokens that each layer takes, with method mctf", show_default="by --ratio"),
    ]
    attention: Annotated[
        Attention | None, typer.Option(help="mctf's: fused ahead, or worked out again", show_default="ahead")
    ]
    compare_by: Annotated[CompareBy | None, typer.Option(help="what similarity compares", show_default="normed")]
    rho: Annotated[
        float | None,
        typer.Option(help="impact's: loss without a token that keeps it", show_default="by --kept"),
    ]
    kept: Annotated[
        float | None, typer.Option(help="impact's: share of tokens labelled to be kept", show_default="0.5")
    ]
    relative: Annotated[
        float | None,
        typer.Option(help="with a threshold: power by which similarity goes by an image's mean", show_default="0.0"),
    ]
    kernel: Annotated[
        int | None,
        typer.Option(help="width of the selector's convolutions", show_default="3", callback=at_least(1)),
    ]


def _values(options: dict) -> dict:
    """The options that were given, as a recipe would hold them."""
    found = plain(options)
    if "layers" in found:
        found["layers"] = _layers(found["layers"])
    if "rows" in found:
        found["rows"] = _query_rows(found["rows"])
    if "segment" in found:
        lengths = numbers(found["segment"], int, "--segment")
        found["segment"] = lengths[0] if len(lengths) == 1 else lengths
    for name in ("ratio", "threshold"):
        if name in found:
            each = numbers(found[name], float, f"--{name}")
            found[name] = each[0] if len(each) == 1 else each
    return found


def _layers(text: str) -> list[int] | dict[int, float]:
    """2,4,6 or 3:0.9,5:0.7."""
    if ":" not in text:
        return numbers(text, int, "--layers")
    pairs = [part.split(":") for part in text.split(",")]
    try:
        found = {int(layer): float(ratio) for layer, ratio in pairs}
    except ValueError:
        raise UsageError(f"--layers {text!r} is not a list of layer:ratio; write it like 3:0.9,5:0.7") from None
    if len(found) < len(pairs):
        raise UsageError(f"--layers {text!r} names a layer twice; name each layer once")
    return found


def _query_rows(text: str) -> int | str:
    if text != "all" and not text.isdecimal():
        raise UsageError(f"--rows {text!r} is not a number of query rows; give one number, such as 32, or all")
    return text if text == "all" else int(text)


takes_conversion = group("conversion", _Options, _values)
