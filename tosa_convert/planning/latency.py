"""Plans for a latency: what was predicted layer by layer is measured as a whole, and corrected until it holds."""

from dataclasses import replace

from tosa_convert.base.errors import UsageError
from tosa_convert.planning.cost_model import Conditions, time_models
from tosa_convert.planning.outcome import Plan, Timed
from tosa_convert.planning.search import Search
from tosa_convert.selective.conversion import convert, light_copy

TRIES = 4
"""How many plans are measured for one target."""
ROUNDS = 30


def share_for(search: Search, target_ms: float, conditions: Conditions) -> float:
    """The share of the original's latency that a target is.

    Raises:
        UsageError: the original is as fast already.
    """
    before = time_models({"original": search.model}, conditions, search.progress, ROUNDS)["original"]
    if target_ms >= before:
        raise UsageError(
            f"the model as it is takes {before:.1f} ms ({conditions}), within the target of {target_ms:g} ms: there is "
            "nothing to convert; give a lower --target-ms"
        )
    return target_ms / before


def within_latency(search: Search, budget: float, conditions: Conditions, target_ms: float | None) -> Plan:
    """The plan whose measured latency is nearest to a share of the original's, or to ``target_ms``; within 5 % of it
    unless its ``timed`` says otherwise.

    Raises:
        UsageError: no plan comes down to it, or none is faster than the original.
    """
    least = search.least()
    if budget < least or least >= 1:
        if target_ms is None:
            search.refuse(budget)
        search.refuse(budget, f"a target of {target_ms:g} ms ({conditions})", target_ms / budget)
    found: list[Plan] = []
    asked = budget
    for _ in range(TRIES):
        plan = _measured(search, search.solve(asked), conditions, budget, target_ms)
        found.append(plan)
        if plan.timed.met:
            break
        # What comes on top of the prediction is much the same for plans of about this cost.
        after = asked + (plan.timed.asked - plan.timed.plan) / plan.timed.original
        if not least <= after < 1 or abs(after - asked) < 0.005:
            break
        asked = after
    best = min(found, key=lambda plan: abs(plan.timed.plan / plan.timed.asked - 1))
    if best.timed.share >= 1:
        raise UsageError(
            f"the best plan takes {best.timed.share:.2f} of the original's latency ({conditions}): there is no gain at "
            "this size; try a larger --img-size, or another runtime"
        )
    return replace(best, budget=budget)


def _measured(search: Search, plan: Plan, conditions: Conditions, budget: float, target_ms: float | None) -> Plan:
    converted = convert(light_copy(search.model), plan.config)
    times = time_models({"original": search.model, "plan": converted}, conditions, search.progress, ROUNDS)
    asked = target_ms or budget * times["original"]
    return replace(plan, timed=Timed(times["original"], times["plan"], asked, str(conditions)))
