"""ToSA's token selector (arXiv 2406.08816, section 3): one layer's QKᵀ predicts the next layer's map."""

import torch
import torch.nn.functional as F
from torch import nn


class AttentionSelector(nn.Module):
    """Conv1d(H → hidden) → ReLU → Conv1d(hidden → H) → log-softmax, run along keys for each query row.

    The heads are the channels and the keys the axis of the convolutions, so the selector does not
    depend on the number of tokens. The paper names neither the width nor the kernel of the
    convolutions; ``hidden=None`` means two channels per head.

    It starts out predicting that the next layer attends as this one did (``relu(x) − relu(−x)``
    through the central taps), which distillation then improves on.
    """

    def __init__(self, heads: int, hidden: int | None = None, kernel: int = 3):
        super().__init__()
        self.heads = heads
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

    def _logits(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """(B, H, N, D) twice → (B, N, H, N): for each image and query row, H channels over the keys."""
        batch, heads, tokens, width = queries.shape
        maps = (queries * width**-0.5) @ keys.transpose(-2, -1)
        rows = maps.transpose(1, 2).reshape(batch * tokens, heads, tokens)
        return self.narrow(F.relu(self.widen(rows))).reshape(batch, tokens, heads, tokens)

    def log_maps(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Log of the predicted attention maps of the next layer, (B, H, N, N), each row a distribution."""
        return self._logits(queries, keys).log_softmax(-1).transpose(1, 2)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Column sums of the predicted maps, (B, H, N): how much attention each token will receive."""
        return self._logits(queries, keys).softmax(-1).sum(1)
