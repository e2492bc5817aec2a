"""Methods brought to a budget of multiply–adds."""

from torch import nn

from tosa_convert.base.errors import UsageError
from tosa_convert.config.conversion import ConvertConfig
from tosa_convert.config.validation import build
from tosa_convert.measure.macs_share import MacsShare
from tosa_convert.methods.method import published
from tosa_convert.selective.conversion import convert, light_copy

CLOSE_ENOUGH = 0.002
"""Share of the MACs by which a method may stay below its budget, where it can be set so finely."""
LOWEST_RATIO, MOST_TRIES = 0.02, 10


def config_of(name: str, ratio: float, *others: str) -> ConvertConfig:
    """What the name of a method, or SCORE/BYPASS with or without a SCHEDULE, stands for.

    Args:
        others: names that are known beside them, for the message.
    """
    if name in published():
        return ConvertConfig(method=name, ratio=ratio)
    parts = dict(zip(("score", "bypass", "schedule"), name.split("/"), strict=False))
    if len(parts) < 2 or name.count("/") > 2:
        known = ", ".join([*others, *published()])
        raise UsageError(
            f"there is no method {name!r}; choose from {known}, or write SCORE/BYPASS or "
            "SCORE/BYPASS/SCHEDULE, such as similarity/merge"
        )
    return build(ConvertConfig, {"schedule": "ramp", **parts, "ratio": ratio})


Fitted = tuple[nn.Module, float]
"""A converted model, and its share of the original's multiply–adds."""


def at_budget(model: nn.Module, name: str, budget: float) -> nn.Module:
    """A converted copy that shares the model's weights, with about the highest ratio whose multiply–adds are within
    the budget.

    Raises:
        UsageError: the method cannot reach the budget.
    """
    return fitted(model, name, budget, MacsShare(model))[0]


def fitted(model: nn.Module, name: str, budget: float, share_of: MacsShare) -> Fitted:
    """Found by bisection until one is within the budget, then by regula falsi, since multiply–adds are nearly linear in
    the ratio."""
    low, high = LOWEST_RATIO, 1.0
    share_low, share_high = 0.0, 1.0
    best, reason = None, None
    for _ in range(MOST_TRIES):
        place = 0.5 if best is None else (budget - share_low) / (share_high - share_low)
        ratio = round(low + (high - low) * min(max(place, 0.05), 0.95), 4)
        try:
            candidate = convert(light_copy(model), config_of(name, ratio))
        except UsageError as error:  # perhaps a ratio too low for the schedule
            low, share_low, reason = ratio, 0.0, error
            continue
        share = share_of.of(candidate)
        if share > budget:
            high, share_high = ratio, share
            continue
        low, share_low, best = ratio, share, (candidate, share)
        if share > budget - CLOSE_ENOUGH:
            break
    if best is None:
        raise reason or UsageError("it cannot reach this budget; give a higher one, or more layers")
    return best
