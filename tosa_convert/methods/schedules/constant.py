"""MCTF's schedule (arXiv 2403.10030, section 4.1): a fixed number of tokens is gone after each layer but the first."""

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

    def ratios(self, ratio, count, acts):
        each = 2 * (1 - ratio) / (count + 1)
        if each * count >= 1:
            # At 0.5 the last layer takes half of its tokens, the most for a matching of two halves.
            raise ValueError(f"a mean ratio of {ratio} would end at no token at all; stay above 0.50")
        return [round(1 - each * step, 6) for step in range(1, count + 1)]

    def ratios_of(self, ratio, count, acts, patches):
        r = self.options.r
        if r is None or not patches:
            return self.ratios(ratio, count, acts)
        if patches - r * count < LEAST:
            most = min((patches - LEAST) // count, patches // (count + 1))
            raise ValueError(
                f"r {r} takes {r * count} tokens in {count} layers, and of {patches} patch tokens at least {LEAST} "
                f"have to be left; {f'give at most {most}' if most > 0 else 'name fewer layers, or take larger images'}"
            )
        # Rounded down to whole ten-thousandths: a layer keeps the next whole number above.
        return [(patches - r * step) * 10_000 // patches / 10_000 for step in range(1, count + 1)]
