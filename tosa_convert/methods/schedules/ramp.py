"""The ratio falls evenly from layer to layer, and the one that is asked for is the mean."""

from tosa_convert.methods.schedule import Schedule
from tosa_convert.methods.score import Acts


class Ramp(Schedule):
    """Where tokens are gone after a layer this takes a fixed number per layer, ToMe's r (arXiv 2210.09461), and the
    ratio is the mean over what enters each layer and what leaves it."""

    def ratios(self, ratio, count, acts):
        if 2 * ratio - 1 <= 0:
            raise ValueError(f"a ramp with a mean ratio of {ratio} would end at no token at all; stay above 0.5")
        places = [(index + (0.5 if acts is Acts.AROUND else 1)) / count for index in range(count)]
        return [round(1 - 2 * (1 - ratio) * place, 6) for place in places]
