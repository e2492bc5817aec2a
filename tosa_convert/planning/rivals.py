"""The last step of a search: published methods that take tokens away inside the model, at the same multiply–adds."""

from contextlib import suppress
from dataclasses import replace

import torch

from tosa_convert.base.errors import TosaError
from tosa_convert.measure.similarity import Keep, error, observe
from tosa_convert.methods.bypass import Bypass
from tosa_convert.methods.method import published
from tosa_convert.methods.parts import every
from tosa_convert.methods.score import Acts, Score
from tosa_convert.planning.budget import Fitted, fitted
from tosa_convert.planning.outcome import Plan
from tosa_convert.planning.search import Search
from tosa_convert.planning.trial import typical

NEAREST = 3
"""Methods that are measured on all images: a handful tells some apart by chance."""


def against_published(search: Search, plan: Plan, target: float | None = None) -> Plan:
    """A plan, or the published method that is ahead of it on its images, by however little: the plan was fitted to them
    and the method was not. All of them are measured on the first images, the nearest and those that cannot come down to
    the budget also with one share of tokens gone in each layer, then the nearest on all; the error of the best joins
    the plan's rivals.

    Args:
        target: the largest drop allowed.
    """
    methods = lasting(search.keep in (Keep.PATCHES, Keep.MAP))
    found: dict[str, Fitted] = {}
    first: dict[str, torch.Tensor] = {}
    with search.progress.track("published methods", len(methods) + 2) as advance:

        def try_out(name: str) -> None:
            with suppress(TosaError):  # not for this model, or not at this budget
                converted = fitted(search.model, name, plan.budget, search.share_of)
                found[name], first[name] = converted, _errors(search, converted[0], 0)

        for name in methods:
            try_out(name)
            advance(name)
        near = _nearest(first)
        for name in _evenly([name for name in methods if name in near or name not in found]):
            try_out(name)
        advance("one share in each layer")
        if not found:
            return plan
        on_all = {name: _on_all(search, found[name][0], first[name]) for name in _nearest(first)}
        best = min(on_all, key=lambda name: typical(on_all[name]))
        (rival, share), errors = found[best], on_all[best]
        rivals = {**plan.rivals, best: typical(errors)}
        if typical(errors) >= plan.measured:
            return replace(plan, rivals=rivals)
    drop = search.lost([observe(rival, batch) for batch in search.batches])
    if target is not None and drop > target:
        return replace(plan, rivals=rivals)
    rivals = {**plan.rivals, "the plan without it": plan.measured}
    measured = typical(errors)
    return replace(plan, config=rival.tosa_config, cost=share, drop=drop, measured=measured, rivals=rivals)


def lasting(every_patch: bool) -> list[str]:
    """Methods after whose layers there are fewer tokens, and that need no training.

    Args:
        every_patch: whether every patch has to be there in the end.
    """
    scores, bypasses = every(Score), every(Bypass)
    return [
        name
        for name, method in published().items()
        if bypasses[method.bypass].acts is not Acts.AROUND
        and not scores[method.score].learns
        and (bypasses[method.bypass].puts_back or not every_patch)
    ]


def _nearest(errors: dict[str, torch.Tensor]) -> list[str]:
    return sorted(errors, key=lambda name: typical(errors[name]))[:NEAREST]


def _evenly(names: list[str]) -> list[str]:
    """Published methods with the same share of tokens gone in each layer, but for those that are so already: it comes
    down to budgets where as many tokens in each would be more than there are, and can be nearer above them too."""
    methods = [published()[name] for name in names]
    known = {f"{method.score}/{method.bypass}/{method.schedule}" for method in methods}
    evenly = dict.fromkeys(f"{method.score}/{method.bypass}/geometric" for method in methods)
    return [way for way in evenly if way not in known]


def _errors(search: Search, model, part: int) -> torch.Tensor:
    """The errors of the images of a batch."""
    seen = observe(model, search.batches[part])
    return error(seen, search.wanted[part], search.keep)


def _on_all(search: Search, model, first: torch.Tensor) -> torch.Tensor:
    return torch.cat([first, *(_errors(search, model, part) for part in range(1, len(search.batches)))])
