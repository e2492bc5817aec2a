"""The tokens that the others look at most (frequency-aware token reduction, arXiv 2511.21477, section 3.2, Eq. 5 to 9).

The paper splits attention into the mean over all tokens, 1/n, and the rest, and keeps the tokens whose columns of the
rest are heaviest. Taking the same number from every entry leaves the order of the columns as it is.
"""

import torch

from tosa_convert.methods.score import Score
from tosa_convert.methods.token_ops import wide


class Received(Score):
    """The attention that each token gets, the mean over all queries."""

    def read(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """(B, H, N, D) twice → (B, H, N)."""
        logits = wide(queries * queries.shape[-1] ** -0.5 @ keys.mT)
        return logits.softmax(-1).mean(2)
