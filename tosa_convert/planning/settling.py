"""The first step of a search: score, bypass and what is compared, before the ratios."""

import torch

from tosa_convert.methods.bypass import Bypass
from tosa_convert.methods.method import control, published
from tosa_convert.methods.parts import every
from tosa_convert.methods.score import Acts, Score
from tosa_convert.models.adapter import adapter_of
from tosa_convert.planning.allocation import Allocation, bent_ramp
from tosa_convert.planning.search import Search
from tosa_convert.planning.trial import ahead, roots, typical


def settle_on_parts(search: Search, budget: float) -> None:
    """The pair of score and bypass that does best on a ramp, over all layers or over the second half of them. All are
    measured on the first images; of these a handful can mislead, so another score than the one that bypasses are
    compared with has to be clearly ahead of it on all."""
    scores, bypasses = _scores_and_bypasses(search)
    # Bypasses are compared with the score that has most to offer them.
    lead = max(scores, key=lambda name: (every(Score)[name].finds_partners, len(every(Score)[name].variants)))
    with search.progress.track("scores and bypasses", len(scores) + len(bypasses) - 1) as advance:

        def best_of(pairs: list[tuple[str, str]]) -> tuple[str, str]:
            for pair in pairs:
                search.parts[pair] = typical(_of_ramps(search, *pair, budget, 1))
                advance(" × ".join(min(search.parts, key=search.parts.__getitem__)))
            return min(search.parts, key=search.parts.__getitem__)

        _, bypass = best_of([(lead, bypass) for bypass in bypasses])
        score, bypass = best_of([(score, bypass) for score in scores if score != lead])
    if score != lead:
        whole = len(search.batches)
        errors = (roots(_of_ramps(search, each, bypass, budget, whole)) for each in (score, lead))
        score = score if ahead(*errors) else lead
    search.build(score, bypass)
    _settle_on_options(search, budget)


def _of_ramps(search: Search, score: str, bypass: str, budget: float, parts: int) -> torch.Tensor:
    """Errors of so many batches on the better, by the first batch, of two ramps that skip about as much as the budget
    asks for."""
    search.build(score, bypass)
    first = [(ramp, search.error_of(ramp, 0)) for ramp in _two_ramps(search, budget)]
    ramp, errors = min(first, key=lambda pair: typical(pair[1]))
    return torch.cat([errors, *(search.error_of(ramp, part) for part in range(1, parts))])


def _two_ramps(search: Search, budget: float) -> list[Allocation]:
    """Over all layers and over the second half of them, skipping about as much as the budget asks for."""
    found, depth = [], len(adapter_of(search.model).blocks)
    for first in (0, len(search.layers) // 2):
        lowest = max(0.2, 1 - 2 * (1 - budget) * depth / (len(search.layers) - first))
        found.append(bent_ramp(search.layers, first, 1.0, search.segment or 1)(lowest))
    return found


def _settle_on_options(search: Search, budget: float) -> None:
    """Variants of the score that are ahead of it as it is, on the better of two ramps and some of the images."""
    score, bypass = search.probe.tosa_config.score, search.probe.tosa_config.bypass
    variants = every(Score)[score].variants
    if not variants:
        return
    parts = range(min(2, len(search.batches)))
    with search.progress.track("what is compared", 1 + len(variants)) as advance:
        ramp = min(_two_ramps(search, budget), key=lambda ramp: typical(search.error_of(ramp, 0)))
        best = roots(torch.cat([search.error_of(ramp, part) for part in parts]))
        advance()
        for variant in variants:
            before, search.options = search.options, variant
            search.build(score, bypass)
            found = roots(torch.cat([search.error_of(ramp, part) for part in parts]))
            if ahead(found, best):
                best = found
            else:
                search.options = before
            advance(" ".join(f"{name} {value}" for name, value in search.options.items()))
    search.build(score, bypass)


def _scores_and_bypasses(search: Search) -> tuple[list[str], list[str]]:
    """Scores that need no training and can do any ratio, but for the control; bypasses that leave every token."""
    class_token = adapter_of(search.model).class_token
    scores = [
        name
        for name, part in every(Score).items()
        if name != published()[control()].score
        and part.suits(Acts.AROUND)
        and not (part.learns or part.least)
        and (class_token or not part.needs_class_token)
    ]
    grouping = (search.segment or 1) > 1
    bypasses = {name: part for name, part in every(Bypass).items() if part.acts is Acts.AROUND}
    return scores, [name for name, part in bypasses.items() if part.groups or not grouping]
