"""ToMe's bypass (arXiv 2210.09461, section 3): skipped tokens stay merged into their partner."""

from tosa_convert.methods.bypass import Bypass, merged
from tosa_convert.methods.score import Acts
from tosa_convert.methods.token_ops import add_up, wide


class Persist(Bypass):
    """Averages are weighted by how many tokens each one stands for already."""

    acts = Acts.BETWEEN
    partners = proportional = True

    def reduce(self, tokens, choice, groups, weights):
        own = groups.sizes[..., None]
        sizes, summed = add_up(choice, wide(own), wide(tokens) * wide(own))
        return (summed / sizes).to(tokens.dtype), merged(choice, groups, sizes[..., 0].to(own.dtype))
