"""MCTF's bypass (arXiv 2403.10030, sections 3.2 and 3.3): tokens are fused before a layer, which uses the attention of
the tokens that they were."""

from typing import Literal

from tosa_convert.methods import parts
from tosa_convert.methods.bypass import Bypass, merged
from tosa_convert.methods.score import Acts
from tosa_convert.methods.token_ops import add_up, wide


class Pool(Bypass):
    """A group is the mean of its tokens, weighed by the attention that they get in the layer times how many tokens each
    stands for; later layers weigh it by that number."""

    class Options(parts.Options):
        """
        Attributes:
            attention: "ahead" works out the layer's attention once, before fusing, and fuses it too: summed over keys,
                a weighted mean over queries. "precise" works it out again on the fused tokens.
        """

        attention: Literal["ahead", "precise"] = "ahead"

    acts = Acts.BEFORE
    partners = proportional = True

    @property
    def looks_ahead(self):
        return self.options.attention == "ahead"

    def pooling(self, choice, groups):
        if choice.weights is None:
            return super().pooling(choice, groups)
        weights = choice.weights * groups.sizes
        return (weights / weights.amax(1, keepdim=True)).clamp(min=1e-6)[..., None]

    def reduce(self, tokens, choice, groups, weights):
        shares = self.pooling(choice, groups)
        sizes, total, summed = add_up(choice, groups.sizes[..., None], wide(shares), wide(tokens) * wide(shares))
        return (summed / total).to(tokens.dtype), merged(choice, groups, sizes[..., 0])
