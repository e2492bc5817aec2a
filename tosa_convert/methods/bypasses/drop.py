"""Skipped tokens are removed: for classification by the class token only."""

from tosa_convert.methods.bypass import Bypass
from tosa_convert.methods.score import Acts
from tosa_convert.methods.token_ops import gather_tokens


class Drop(Bypass):
    """A removed token has no group any more, so groups are not tracked."""

    acts = Acts.BETWEEN
    puts_back = False

    def reduce(self, tokens, choice, groups, weights):
        return gather_tokens(tokens, choice.attended), None
