"""Tokens are merged in one layer, as Mutual Pair Merging does (arXiv 2604.05718)."""

import math

from tosa_convert.methods.schedule import Schedule

MERGED = 0.3
"""About the share of tokens that are the second of a mutual pair."""


class Once(Schedule):
    """As late as the ratio that is asked for allows, which is the mean over the layers."""

    def ratios(self, ratio, count, acts):
        missing = count * (1 - ratio)
        fewer = min(count, math.ceil(missing / MERGED - 1e-9))
        return [1.0] * (count - fewer) + [round(1 - missing / fewer, 6)] * fewer if fewer else [1.0] * count
