"""MCTF's schedule (arXiv 2403.10030, section 4.1): a fixed number of tokens is gone after each layer but the first."""

import itertools
from typing import Annotated

from pydantic import Field

from tosa_convert.methods import parts
from tosa_convert.methods.schedule import Schedule

LEAST = 10
"""Patch tokens that are always left."""


class Constant(Schedule):
    """By ``r``, or without it so many that the ratio that is asked for is the mean over these layers."""

    class Options(parts.Options):
        """
        Attributes:
            r: tokens that each layer takes at the model's own image size; None: by the ratio.
        """

        r: Annotated[int, Field(ge=1)] | None = None

    def layers(self, depth, first):
        return list(range(max(2, first), depth + 1))

    def gone(self, count: int) -> list[int]:
        """For each of ``count`` layers in how many steps' worth of tokens are gone after it."""
        return list(range(1, count + 1))

    def ratios(self, ratio, count, acts):
        steps = self.gone(count)
        each = count * (1 - ratio) / sum(steps)
        if each * steps[-1] >= 1:
            least = 1 - sum(steps) / count / _in_halves(steps)
            raise ValueError(f"a mean ratio of {ratio} would end at no token at all; stay above {least:.2f}")
        return [round(1 - each * step, 6) for step in steps]

    def ratios_of(self, ratio, count, acts, patches):
        r = self.options.r
        if r is None or not patches:
            return self.ratios(ratio, count, acts)
        steps = self.gone(count)
        if patches - r * steps[-1] < LEAST:
            most = min((patches - LEAST) // steps[-1], patches // _in_halves(steps))
            raise ValueError(
                f"r {r} takes {r * steps[-1]} tokens in {count} layers, and of {patches} patch tokens at least {LEAST} "
                f"have to be left; {f'give at most {most}' if most > 0 else 'name fewer layers, or take larger images'}"
            )
        # Rounded down to whole ten-thousandths: a layer keeps the next whole number above.
        return [(patches - r * step) * 10_000 // patches / 10_000 for step in steps]


def _in_halves(steps: list[int]) -> int:
    """How many steps' worth of tokens an image has to have for no layer to take more than half of those that are left,
    the most for a matching of two halves."""
    return max(2 * now - before for before, now in itertools.pairwise([0, *steps]))
