"""A skipped token adds the update that its most similar attended token received."""

from tosa_convert.methods.bypass import Bypass, Gathered
from tosa_convert.methods.token_ops import gather_tokens


class Borrow(Bypass):
    """Each skipped token borrows an update."""

    partners = groups = True

    def gather(self, tokens, normed, choice):
        return Gathered(gather_tokens(tokens, choice.attended))
