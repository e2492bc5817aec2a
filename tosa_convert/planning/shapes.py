"""The shapes of keep ratios over the layers that a search tries, by name."""

from tosa_convert.planning.allocation import Shape, bent_ramp, ramp

STARTS = (0.0, 0.17, 0.34, 0.5, 0.67)
"""Where ramps begin, as shares of the layers."""
BENDS = (0.0, 0.6, 1.0, 1.7)
"""Exponents of the ramps that are tried; 0 is all layers alike."""
PLAIN = "ramp"
"""The name of the ramp that is made by hand."""


def starts(depth: int) -> list[int]:
    """How many layers come before the ramps, in a model of so many."""
    return sorted({round(share * depth) for share in STARTS})


class Shapes:
    """Ramps over some layers, each with where it begins, how it is bent and how many layers share a choice.

    Args:
        layers: that can be selective.
        starts: see :func:`starts`.
        spans: how many layers may share a choice.
    """

    def __init__(self, layers: list[int], starts: list[int], spans: tuple[int, ...]):
        self.layers, self.starts, self.spans = layers, starts, spans
        self.known = {PLAIN: (0, 1.0, spans[0])}

    def first(self) -> dict[str, Shape]:
        """Ramps that begin at different layers, bent differently, the plain one, and what comes down the furthest."""
        span = self.spans[min(1, len(self.spans) - 1)]
        firsts = sorted({min(start, len(self.layers) - 1) for start in self.starts})
        return {
            **self._new([*((first, bend, span) for first in firsts for bend in BENDS), (0, 0.0, self.spans[-1])]),
            PLAIN: ramp(self.layers, self.spans[0]),
        }

    def near(self, name: str) -> dict[str, Shape]:
        """Ramps that begin a layer earlier or later than another, are bent a little more or less, or have longer or
        shorter segments."""
        first, bend, span = self.known[name]
        near = [(first - 1, bend, span), (first + 1, bend, span)]
        near += [(first, max(0.0, bend + by), span) for by in (-0.4, -0.2, 0.25, 0.5)]
        near += [(first, bend, other) for other in self.spans]
        known = self.known.values()
        return self._new([each for each in near if 0 <= each[0] < len(self.layers) and each not in known])

    def _new(self, each: list[tuple[int, float, int]]) -> dict[str, Shape]:
        named = {_name(*one): one for one in each}
        self.known |= named
        return {name: bent_ramp(self.layers, *one) for name, one in named.items()}


def _name(first: int, bend: float, span: int) -> str:
    shared = f", {span} layers to a choice" if span > 1 else ""
    return f"from layer {first + 1}, bent by {bend:g}{shared}"
