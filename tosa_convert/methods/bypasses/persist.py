"""ToMe's bypass (arXiv 2210.09461, section 3): skipped tokens stay merged into their partner."""

from tosa_convert.methods.bypass import Bypass, Groups
from tosa_convert.methods.score import Acts
from tosa_convert.methods.token_ops import add_up, pick, stand_ins


class Persist(Bypass):
    """Averages are weighted by how many tokens each one stands for already."""

    acts = Acts.BETWEEN
    partners = proportional = True

    def reduce(self, tokens, choice, groups, weights):
        sizes = add_up(groups.sizes[..., None], choice)
        means = add_up(tokens * groups.sizes[..., None], choice) / sizes
        return means, Groups(sizes[..., 0], pick(stand_ins(choice), groups.places))
