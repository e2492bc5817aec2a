"""Whether the parts of a conversion go together."""

from typing import TYPE_CHECKING, Any

from tosa_convert.methods import parts
from tosa_convert.methods.bypass import Bypass
from tosa_convert.methods.schedule import Schedule
from tosa_convert.methods.score import Acts, Score

if TYPE_CHECKING:
    from tosa_convert.config.conversion import ConvertConfig


def of_before(values: Any) -> Any:
    """Schedule "shifted" of 0.2.0 had layers of its own; a run has them, and their ratios, beside its name."""
    if not isinstance(values, dict) or values.get("schedule") != "shifted" or not isinstance(values.get("ratio"), list):
        return values
    return {**values, "schedule": "constant", "method": "mctf" if values.get("method") else None}


def check_parts(config: "ConvertConfig") -> None:
    """
    Raises:
        ValueError: they do not; the message names what would.
    """
    score, bypass = config.part(Score), config.make(Bypass)
    if bypass.needs_weights and not score.weighs:
        raise ValueError(
            f"bypass {config.bypass} weighs tokens by the class token's attention: use score "
            f"{_names(Score, lambda part: part.weighs)}"
        )
    if bypass.ranks and score.chooses:
        raise ValueError(
            f"bypass {config.bypass} takes those that a score puts last, and score {config.score} chooses "
            f"itself; use {_names(Score, lambda part: not (part.chooses or part.gates))}"
        )
    if not score.suits(bypass.acts):
        raise ValueError(
            f"score {config.score} goes by {score.reads_at(bypass.acts)}, which bypass {config.bypass} does not know "
            f"when it takes tokens away; use {_names(Bypass, lambda part: score.suits(part.acts))}"
        )
    if bypass.per_head and not score.scores_heads:
        fits = _names(Score, lambda part: part.scores_heads)
        raise ValueError(f"selection per_head is ToSA's Eq. 4, for score {fits}")
    whole = config.part(Schedule).whole
    shared = f"schedule {config.schedule}, one choice for all layers," if whole else "segment"
    if (whole or config.segment != 1) and not bypass.shares:
        how = "selection per_head" if bypass.per_head else config.bypass
        fits = _names(Bypass, lambda part: part().shares, "and")
        raise ValueError(f"{shared} is for bypasses around a block that share a choice: {fits}, not {how}")
    if score.gates and (whole or config.segment != 1 or config.reduces):
        raise ValueError(
            f"score {config.score} decides in each layer, with bypasses around a block; leave "
            f"{f'schedule {config.schedule}' if whole else 'segment'} out"
        )
    for part in (score, type(bypass)) if config.threshold is None else ():
        for name in part.for_thresholds:
            if getattr(config, name) != part.Options.model_fields[name].default:
                raise ValueError(f"{name} goes with a threshold, and this conversion has none; leave it out")
    if config.threshold is not None:
        _check_threshold(config, score, bypass)


def _check_threshold(config: "ConvertConfig", score: type[Score], bypass: Bypass) -> None:
    """Any number of tokens may attend around a block, where all of them are there again after it."""
    if config.reduces or bypass.per_head:
        how = "selection per_head" if bypass.per_head else f"bypass {config.bypass}"
        fits = "shared" if bypass.per_head else _names(Bypass, lambda part: part.acts is Acts.AROUND)
        raise ValueError(f"{how} takes a number of tokens, not a threshold; use {fits}")
    if score.chooses and score.worth is Score.worth:
        raise ValueError(f"score {config.score} chooses a number of tokens itself, so it has no threshold")


def _names(kind: type[parts.P], fits, joined: str = "or") -> str:
    *names, last = (name for name, part in parts.every(kind).items() if fits(part))
    return f"{', '.join(names)} {joined} {last}" if names else last
