"""Skipped tokens are averaged into their partner; the layer weighs each group by its size, as ToMe does
(arXiv 2210.09461, section 3.3); each token then adds the update of its group to itself."""

from tosa_convert.methods.bypass import Bypass, Gathered
from tosa_convert.methods.token_ops import add_up, wide


class Merge(Bypass):
    """The attention of a group is that of its tokens' mean after norm1: a mean of tokens is shorter than they are, and
    a norm would magnify what they have in common."""

    partners = gives_normed = groups = True

    def gather(self, tokens, normed, choice):
        counted = tokens.new_ones(*tokens.shape[:2], 1)
        each = [wide(counted), wide(tokens), *([] if normed is None else [wide(normed)])]
        if choice.padding is not None:
            each = [some.masked_fill(choice.padding[..., None], 0) for some in each]
        sizes, *sums = add_up(choice, *each)
        if choice.padding is not None:
            sizes = sizes.clamp(min=1)
        means = [(some / sizes).to(tokens.dtype) for some in sums]
        return Gathered(means[0], sizes[..., 0].to(tokens.dtype), None if normed is None else means[1])
