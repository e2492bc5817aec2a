"""Scorers: which tokens of a layer should attend.

A scorer that ``listens`` to queries and keys works in two steps. ``read(queries, keys)``, both (B, H, N, D),
runs inside the layer it listens to, without parameters, and gives the little that is kept of them; the
module's forward turns that into scores (B, H, N) when the selective layer runs. Higher means: rather attend.
One that does not listen gets features of the layer's own tokens, (B, N, D). One that ``chooses`` is told the keep
ratio too, and gives a :class:`~tosa_convert.tokens.Choice` in place of scores.

A scorer listens to the layer before its own; under a lasting bypass, which acts behind a layer's attention, to
the attention of its own layer (but for ToSA's, which predicts the next one).
"""

from torch import nn

from tosa_convert.config import ConvertConfig
from tosa_convert.passage import Passage
from tosa_convert.scores.attention import AttentionSelector
from tosa_convert.scores.class_attention import ClassAttention
from tosa_convert.scores.norm import KeyNorm
from tosa_convert.scores.random import RandomScore
from tosa_convert.scores.similarity import GridSimilarity, KeySimilarity


def build_score(config: ConvertConfig, heads: int, prefix: int, layer: int, passage: Passage) -> nn.Module:
    """The scorer that ``config`` asks for, for one selective layer (1-based)."""
    match config.score:
        case "attention":
            return AttentionSelector(heads, prefix, rows=config.rows, hidden=config.hidden, kernel=config.kernel)
        case "class_attention":
            return ClassAttention()
        case "norm":
            return KeyNorm()
        case "random":
            return RandomScore(seed=config.seed, layer=layer)
        case "similarity":
            return (KeySimilarity if config.lasting else GridSimilarity)(prefix, passage)
