"""The gate of Select and Pack Attention (arXiv 2410.23608, section 3.2): which tokens a layer selects."""

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from tosa_convert.methods import parts
from tosa_convert.methods.score import Reads, Score, Site, View, Worth


class Gate(Score):
    """The gate's logit, or that of the layer before if it is higher: what was selected once stays likely to be.

    In training tokens are selected by the logits plus the difference of two Gumbel variables, straight through: forward
    by the hard choice, backward by the sigmoid of how far they are from the threshold. Where it differs from the paper,
    which was made for a Swin trained with it from the start: what a layer *adds* to a selected token is weighed by
    σ(logit), not the token itself, and the logits begin at ``start``, so that a pretrained model begins as it was.
    """

    class Options(parts.Options):
        """
        Attributes:
            start: of all logits before training.
            temperature: of the straight-through sigmoid.
        """

        start: float = 4.0
        temperature: Annotated[float, Field(gt=0)] = 1.0

    reads = Reads.TOKENS
    learns = gates = True
    learns_in = "finetune"
    own_threshold = 0.0

    def setup(self, site: Site) -> None:
        self.linear = nn.Linear(site.width, 1)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.constant_(self.linear.bias, self.options.start)

    def score(self, view: View) -> torch.Tensor:
        """(B, N), the logits: those of the normed tokens, and of the layer before."""
        own = self.linear(view.normed)[..., 0]
        return own if view.before is None else torch.maximum(own, view.before)

    def worth(self, view: View) -> Worth:
        logits = self.score(view)
        if not self.training:
            return Worth(logits, weights=logits.sigmoid(), logits=logits)
        uniform = torch.rand_like(logits, dtype=torch.float32).clamp(1e-6, 1 - 1e-6)
        noisy = logits + uniform.logit()  # the difference of two Gumbel variables is logistic
        soft = ((noisy - view.threshold) / self.options.temperature).sigmoid()
        return Worth(noisy, weights=logits.sigmoid() * (1 + soft - soft.detach()), logits=logits)
