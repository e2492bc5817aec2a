"""Skipped tokens are averaged into their partner; the layer weighs each group by its size, as ToMe does
(arXiv 2210.09461, section 3.3); each token then adds the update of its group to itself."""

from tosa_convert.methods.bypass import Bypass
from tosa_convert.methods.token_ops import add_up, gather_tokens, stand_ins


class Merge(Bypass):
    """The attention of a group is that of its tokens' mean after norm1: a mean of tokens is shorter than they are, and
    a norm would magnify what they have in common."""

    partners = gives_normed = True

    def apply(self, run, tokens, normed, choice):
        sizes, summed, normed_sums = add_up(choice, tokens.new_ones(*tokens.shape[:2], 1), tokens, normed)
        means = summed / sizes
        updated = run(means, sizes[..., 0], normed_sums / sizes)
        return tokens + gather_tokens(updated - means, stand_ins(choice))
