"""Shapes of keep ratios over the layers, fitted to a budget."""

from collections.abc import Callable

from tosa_convert.methods.schedules.ramp import Ramp
from tosa_convert.methods.score import Acts
from tosa_convert.planning.cost_model import Prices

Ratios = dict[int, float]
FINE = tuple(round(1 - 0.01 * step, 2) for step in range(78))
"""Keep ratios that a plan may choose from."""


def ramp(layers: list[int], ratio: float) -> Ratios:
    return dict(zip(layers, Ramp().ratios(ratio, len(layers), Acts.AROUND), strict=True))


def bent_ramp(layers: list[int], first: int, bend: float) -> Callable[[float], Ratios]:
    """Layers before the ``first`` keep all tokens; from there on the share of skipped ones grows with a power."""
    count = len(layers) - first
    rises = [((index - first + 0.5) / count) ** bend if index >= first else 0.0 for index in range(len(layers))]

    def shape(lowest: float) -> Ratios:
        return {layer: round(1 - (1 - lowest) * rise, 2) for layer, rise in zip(layers, rises, strict=True)}

    return shape


def nudged(ratios: Ratios, hundredths: int) -> Ratios:
    """So many hundredths of ratio more, or less, spread over the selective layers, the lowest ratios first."""
    ratios = dict(ratios)
    order = sorted((layer for layer in ratios if ratios[layer] < 1), key=ratios.get)
    for turn in range(abs(hundredths)):
        layer = order[turn % len(order)]
        step = 0.01 if hundredths > 0 else -0.01
        ratios[layer] = min(0.99, max(FINE[-1], round(ratios[layer] + step, 4)))
    return ratios


def fit(shape: Callable[[float], Ratios], prices: Prices, budget: float) -> Ratios | None:
    """The highest ratio at which a hand-made shape is within the budget."""
    for ratio in FINE[1:]:
        try:
            ratios = shape(ratio)
        except ValueError:  # a ramp that would reach zero
            return None
        if prices.total(ratios) <= budget:
            return ratios
    return None
