"""Scorers: which tokens of a layer should attend, judged by what the layer before computes.

A scorer works in two steps. ``read(queries, keys)``, both (B, H, N, D), runs inside the ordinary layer
before the selective one, without parameters, and gives the little that is kept of them; the module's
forward turns that into scores (B, H, N) when the selective layer runs. Higher means: rather attend.
"""

from torch import nn

from tosa_convert.config import ConvertConfig
from tosa_convert.scores.attention import AttentionSelector
from tosa_convert.scores.random import RandomScore


def build_score(config: ConvertConfig, heads: int, prefix: int, layer: int) -> nn.Module:
    """The scorer that ``config`` asks for, for one selective layer (1-based)."""
    if config.score == "random":
        return RandomScore(seed=config.seed, layer=layer)
    return AttentionSelector(heads, prefix, rows=config.rows, hidden=config.hidden, kernel=config.kernel)
