"""A skipped token adds the update that its most similar attended token received."""

from tosa_convert.methods.bypass import Bypass
from tosa_convert.methods.token_ops import gather_tokens, stand_ins


class Borrow(Bypass):
    """Each skipped token borrows an update."""

    partners = True

    def apply(self, run, tokens, normed, choice):
        attended = gather_tokens(tokens, choice.attended)
        return tokens + gather_tokens(run(attended) - attended, stand_ins(choice))
