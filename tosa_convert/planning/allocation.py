"""Shapes of keep ratios over the layers, fitted to a budget."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

from tosa_convert.methods.schedules.ramp import Ramp
from tosa_convert.methods.score import Acts
from tosa_convert.planning.cost_model import Prices

FINE = tuple(round(1 - 0.01 * step, 2) for step in range(88))
"""Keep ratios that a plan may choose from."""


class Allocation(NamedTuple):
    """What each layer gets.

    Attributes:
        ratios: layer → keep ratio.
        span: how many layers in a row share one choice, counted from the first that skips tokens.
    """

    ratios: dict[int, float]
    span: int = 1

    @property
    def segments(self) -> list[list[int]]:
        """The layers that skip tokens, by segments."""
        skipping = [layer for layer, ratio in self.ratios.items() if ratio < 1]
        return chunks(skipping, self.span)


Shape = Callable[[float], Allocation]
"""A lowest or mean ratio → what each layer gets."""


def chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def spread(layers: list[int], first: int, span: int, ratios: list[float]) -> Allocation:
    """Ratios of layers, with their mean in each segment from the ``first`` index on."""
    segments = chunks(list(range(first)), 1) + chunks(list(range(first, len(layers))), span)
    means = {
        layers[index]: round(sum(ratios[each] for each in segment) / len(segment), 2)
        for segment in segments
        for index in segment
    }
    return Allocation(means, span)


def ramp(layers: list[int], span: int = 1) -> Shape:
    """The ramp that is made by hand, of a mean ratio."""
    return lambda ratio: spread(layers, 0, span, Ramp().ratios(ratio, len(layers), Acts.AROUND))


def bent_ramp(layers: list[int], first: int, bend: float, span: int = 1) -> Shape:
    """Layers before the ``first`` keep all tokens; from there on the share of skipped ones grows with a power, down to
    a lowest ratio."""
    count = len(layers) - first
    rises = [((index - first + 0.5) / count) ** bend if index >= first else 0.0 for index in range(len(layers))]
    return lambda lowest: spread(layers, first, span, [1 - (1 - lowest) * rise for rise in rises])


def nudged(allocation: Allocation, hundredths: int) -> Allocation:
    """About so many hundredths of ratio more, or less, spread over the selective layers, the lowest ratios first: no
    more than so many more, and no fewer less."""
    ratios = dict(allocation.ratios)
    order = sorted(allocation.segments, key=lambda segment: ratios[segment[0]])
    step, left = (0.01, hundredths) if hundredths > 0 else (-0.01, -hundredths)
    for segment in itertools.cycle(order):
        if left <= 0 or (step > 0 and left < len(segment)):
            break
        left -= len(segment)
        for layer in segment:
            ratios[layer] = min(0.99, max(FINE[-1], round(ratios[layer] + step, 4)))
    return allocation._replace(ratios=ratios)


def fit(shape: Shape, prices: Prices, budget: float) -> Allocation | None:
    """The highest ratio at which a hand-made shape is within the budget."""
    for ratio in FINE[1:]:
        try:
            allocation = shape(ratio)
        except ValueError:  # a ramp that would reach zero
            return None
        if prices.total(allocation.ratios, allocation.segments) <= budget:
            return allocation
    return None
