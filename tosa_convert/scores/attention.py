"""ToSA's token selector (arXiv 2406.08816, section 3): one layer's QKᵀ predicts the next layer's map."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from tosa_convert.tokens import spread_rows


class AttentionSelector(nn.Module):
    """Conv1d(H → hidden) → ReLU → Conv1d(hidden → H) → log-softmax, run along keys for each query row.

    The heads are the channels and the keys the axis of the convolutions, so the selector does not
    depend on the number of tokens. The paper names neither the width nor the kernel of the
    convolutions; ``hidden=None`` means two channels per head.

    Each query row is predicted on its own, so the column sums over a few rows stand for those over all:
    only ``rows`` rows of QKᵀ are ever computed. ``rows="all"`` is the paper's computation. ``prefix``
    is the number of class and register tokens; the first one's row is always among the rows.

    It starts out predicting that the next layer attends as this one did (``relu(x) − relu(−x)``
    through the central taps), which distillation then improves on.
    """

    def __init__(self, heads: int, prefix: int, rows: int | str = "all", hidden: int | None = None, kernel: int = 3):
        super().__init__()
        self.heads, self.prefix, self.rows = heads, prefix, rows
        hidden = hidden or 2 * heads
        self.widen = nn.Conv1d(heads, hidden, kernel, padding=kernel // 2)
        # No bias: a constant along the keys would vanish in the softmax.
        self.narrow = nn.Conv1d(hidden, heads, kernel, padding=kernel // 2, bias=False)
        if hidden >= 2 * heads:
            self._start_as_identity(kernel // 2)

    @torch.no_grad()
    def _start_as_identity(self, centre: int) -> None:
        self.widen.weight.mul_(0.1)
        self.widen.bias.zero_()
        self.narrow.weight.mul_(0.1)
        for head in range(self.heads):
            positive, negative = 2 * head, 2 * head + 1
            self.widen.weight[positive, head, centre] += 1
            self.widen.weight[negative, head, centre] -= 1
            self.narrow.weight[head, positive, centre] += 1
            self.narrow.weight[head, negative, centre] -= 1

    def query_rows(self, tokens: int, choose: Callable = spread_rows) -> torch.Tensor | slice:
        """Which query rows are read: chosen by ``choose``, or all of them."""
        # A symbolic number of tokens is not an int, and must not be decided on.
        if self.rows == "all" or (isinstance(tokens, int) and tokens <= self.rows):
            return slice(None)
        return choose(tokens, self.prefix, self.rows)

    def _logits(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """(B, H, R, D) and (B, H, N, D) → (B, R, H, N): per image and query row, H channels over the keys."""
        batch, heads, rows, width = queries.shape
        tokens = keys.shape[2]
        maps = (queries * width**-0.5) @ keys.transpose(-2, -1)
        channels = maps.transpose(1, 2).reshape(batch * rows, heads, tokens)
        return self.narrow(F.relu(self.widen(channels))).reshape(batch, rows, heads, tokens)

    def log_maps(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Log of R rows of the next layer's predicted attention maps, from R rows of queries and all keys:
        (B, H, R, D) and (B, H, N, D) → (B, H, R, N), each row a distribution."""
        return self._logits(queries, keys).log_softmax(-1).transpose(1, 2)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """(B, H, N, D) twice → (B, H, N), column sums of the predicted maps over the query rows that are
        read: how much attention each token will receive."""
        return self._logits(queries[:, :, self.query_rows(queries.shape[2])], keys).softmax(-1).sum(1)
