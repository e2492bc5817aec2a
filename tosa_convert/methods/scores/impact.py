"""Token impact's filter (DL-ViT, arXiv 2305.14840, section 3): which tokens the loss would miss."""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn

from tosa_convert.methods import parts
from tosa_convert.methods.score import Reads, Score, Site, View, Worth

KEPT = 0.5


class Impact(Score):
    """An MLP on the tokens as they enter the layer, position embedding added.

    It learns from pseudo-labels: the impact of a token is the loss of the frozen model with that token zeroed, less the
    loss with all; tokens above ``rho`` are to be kept. The paper leaves the MLP's width open; here it is a quarter of
    the model's, at least 16.
    """

    class Options(parts.Options):
        """
        Attributes:
            rho: impact (nats) above which a token is labelled to be kept; None takes the share ``kept``.
            kept: share of all tokens that is labelled to be kept, those with the largest impact; without either half.
        """

        rho: float | None = Field(default=None, allow_inf_nan=False)
        kept: Annotated[float, Field(gt=0, lt=1)] | None = None

        @model_validator(mode="after")
        def _one(self) -> "Impact.Options":
            if self.rho is not None and self.kept is not None:
                raise ValueError("rho and kept both say which tokens are kept; leave out one of the two")
            return self

    reads = Reads.TOKENS
    learns = True
    learns_in = "ablation"
    own_threshold = 0.0

    def setup(self, site: Site) -> None:
        hidden = max(16, site.width // 4)
        self.filter = nn.Sequential(
            nn.LayerNorm(site.width), nn.Linear(site.width, hidden), nn.GELU(), nn.Linear(hidden, 1)
        )

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, D) → (B, N)."""
        return self.filter(tokens)[..., 0]

    def score(self, view: View) -> torch.Tensor:
        return self.logits(view.tokens)

    def worth(self, view: View) -> Worth:
        return Worth(self.logits(view.tokens))

    def fit(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, D) and whether each is to be kept (B, N) → a loss, in which both kinds weigh alike."""
        share = labels.float().mean().clamp(0.01, 0.99)
        return F.binary_cross_entropy_with_logits(
            self.logits(tokens).float(), labels.float(), pos_weight=(1 - share) / share
        )
