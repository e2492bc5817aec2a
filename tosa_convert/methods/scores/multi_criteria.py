"""MCTF's score (arXiv 2403.10030, section 3.1): pairs that are alike, tell little and stand for few are fused first."""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field

from tosa_convert.methods import parts
from tosa_convert.methods.matching import choose_both_ways
from tosa_convert.methods.score import Reads, Score, Site, View
from tosa_convert.methods.token_ops import Choice, keep_count

Temperature = Annotated[float, Field(gt=0)]


class MultiCriteria(Score):
    """The weight of a pair is the product of three, each to the power of one over a temperature: of its similarity,
    from the cosine of its tokens; of how little attention each gets in the layer; of how few tokens each stands for."""

    class Options(parts.Options):
        """
        Attributes:
            tau_similarity, tau_information, tau_size: temperatures of the criteria; the higher, the less one counts.
        """

        tau_similarity: Temperature = 1.0
        tau_information: Temperature = 20.0
        tau_size: Temperature = 40.0

    reads = Reads.ATTENTION
    chooses = finds_partners = half_at_most = True

    def setup(self, site: Site) -> None:
        self.prefix = site.prefix

    def score(self, view: View) -> Choice:
        tau, patches = self.options, view.tokens.shape[1] - self.prefix
        units = F.normalize(view.tokens.narrow(1, self.prefix, patches).float(), dim=-1)
        little = _little(view.received.narrow(1, self.prefix, patches).float(), tau.tau_information)
        few = 1.0 if view.sizes is None else _little(view.sizes.narrow(1, self.prefix, patches).float(), tau.tau_size)
        # What one token brings to the weights of all of its pairs.
        own = little * few
        alike = ((units[:, ::2] @ units[:, 1::2].mT + 1) / 2).clamp(min=0) ** (1 / tau.tau_similarity)
        weights = alike * own[:, ::2, None] * own[:, None, 1::2]
        choice = choose_both_ways(weights, self.prefix, keep_count(view.patches, view.steps))
        return choice._replace(weights=view.received)


def _little(values: torch.Tensor, temperature: float) -> torch.Tensor:
    """(B, N): one over each value, as a share of the largest such, to the power of one over the temperature."""
    values = values.clamp(min=torch.finfo(values.dtype).tiny)  # attention may come out as nothing at all
    return (values.amin(1, keepdim=True) / values) ** (1 / temperature)
