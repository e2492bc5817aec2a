"""Skipped tokens are removed: for classification by the class token only."""

from tosa_convert.methods.bypass import Bypass
from tosa_convert.methods.score import Acts
from tosa_convert.methods.token_ops import gather_tokens, pick


class Drop(Bypass):
    """A removed token has no group any more."""

    acts = Acts.BETWEEN
    puts_back = False

    def reduce(self, tokens, choice, groups, weights):
        sizes, at = (pick(each, choice.attended) for each in (groups.sizes, groups.at))
        return gather_tokens(tokens, choice.attended), groups._replace(sizes=sizes, places=None, at=at)
