"""Shapes of keep ratios over the layers, fitted to a budget, and the allocation of a budget by curves of error."""

from collections.abc import Callable

import numpy as np

from tosa_convert.methods.schedules.ramp import Ramp
from tosa_convert.methods.score import Acts
from tosa_convert.planning.cost_model import Prices

Ratios = dict[int, float]
Curves = dict[int, tuple[np.ndarray, np.ndarray]]
"""Per layer the ratios to choose from, and the error at each."""
FINE = tuple(round(1 - 0.01 * step, 2) for step in range(78))
"""Keep ratios that a plan may choose from."""


def ramp(layers: list[int], ratio: float) -> Ratios:
    return dict(zip(layers, Ramp().ratios(ratio, len(layers), Acts.AROUND), strict=True))


def bent_ramp(layers: list[int], first: int, bend: float) -> Callable[[float], Ratios]:
    """Layers before the ``first`` keep all tokens; from there on the share of skipped ones grows with a power."""
    count = len(layers) - first
    rises = [((max(index - first, -0.5) + 0.5) / count) ** bend for index in range(len(layers))]

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


def allocate(curves: Curves, prices: Prices, budget: float) -> Ratios:
    """The ratios with the least sum of errors whose cost is within the budget, or the cheapest if none is.

    For a price of error per cost each layer's best ratio is found on its own; the price is lowered until
    the budget is just met (Lagrange).
    """
    saved = {layer: np.array([prices.at(ratio) for ratio in options]) for layer, (options, _) in curves.items()}

    def best(weight: float) -> Ratios:
        return {
            layer: float(options[int(np.argmin(errors - weight * saved[layer]))])
            for layer, (options, errors) in curves.items()
        }

    low, high = -9.0, 9.0  # powers of ten
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if prices.total(best(10**middle)) <= budget else (middle, high)
    return best(10**high)


def predicted_change(curves: Curves, ratios: Ratios) -> float:
    """The sum of the errors at these ratios."""
    return sum(float(errors[options.tolist().index(ratios[layer])]) for layer, (options, errors) in curves.items())
