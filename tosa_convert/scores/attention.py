"""ToSA's token selector (arXiv 2406.08816, section 3): one layer's QKᵀ predicts the next layer's map."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from tosa_convert.tokens import spread_rows

ROWS_AT_ONCE = 64
"""Query rows that are scored at a time, see :meth:`AttentionSelector.forward`."""


class QueryKeyRows(nn.Module):
    """The rows of QKᵀ / √D that a selector reads, the only ones ever computed; ``rows="all"`` computes all.

    ``prefix`` is the number of class and register tokens; the first one's row is always among the rows.
    """

    def __init__(self, prefix: int, rows: int | str):
        super().__init__()
        self.prefix, self.rows = prefix, rows

    def choose(self, tokens: int, how: Callable = spread_rows) -> torch.Tensor | None:
        """Which of so many query rows are read: positions chosen by ``how``, or None for all of them."""
        if isinstance(tokens, torch.Tensor):  # in a trace, such as fvcore's, which is of one size
            tokens = int(tokens)
        # A symbolic number of tokens is not an int, and must not be decided on: a graph for every image size
        # reads so many rows also where it has fewer tokens, and some of them twice.
        if self.rows == "all" or (isinstance(tokens, int) and tokens <= self.rows):
            return None
        return how(tokens, self.prefix, self.rows)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """(B, H, N, D) twice → (H, B, R, N). The rows are those given, or chosen evenly."""
        rows = self.choose(queries.shape[2]) if rows is None else rows
        if rows is not None:
            queries = queries.index_select(2, rows.to(queries.device))
        queries = queries * queries.shape[-1] ** -0.5
        # Head by head, since a batched product would first copy the keys out of the projection they are a view of.
        return torch.stack([queries[:, head] @ keys[:, head].mT for head in range(keys.shape[1])])


class AttentionSelector(nn.Module):
    """Conv1d(H → hidden) → ReLU → Conv1d(hidden → H) → log-softmax, run along keys for each query row.

    The heads are the channels and the keys the axis of the convolutions, so the selector does not
    depend on the number of tokens. The paper names neither the width nor the kernel of the
    convolutions; ``hidden=None`` means two channels per head.

    Each query row is predicted on its own, so the column sums over a few rows stand for those over all:
    ``read`` computes no more of QKᵀ than is looked at. ``rows="all"`` is the paper's computation.

    It starts out predicting that the next layer attends as this one did (``relu(x) − relu(−x)``
    through the central taps), which distillation then improves on.
    """

    listens, chooses = True, False

    def __init__(self, heads: int, prefix: int, rows: int | str = "all", hidden: int | None = None, kernel: int = 3):
        super().__init__()
        self.heads, self.kernel = heads, kernel
        self.read = QueryKeyRows(prefix, rows)
        hidden = hidden or 2 * heads
        # Padded once for both. No bias in the second: a constant along the keys would vanish in the softmax.
        self.widen = nn.Conv1d(heads, hidden, kernel, padding=kernel - 1)
        self.narrow = nn.Conv1d(hidden, heads, kernel, bias=False)
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

    def logits(self, maps: torch.Tensor) -> torch.Tensor:
        """Rows of one layer's QKᵀ, (H, B, R, N) → rows of the next layer's, predicted. Beyond the keys the
        map counts as zero."""
        if torch.compiler.is_exporting():  # the same sums in the form that is faster in ONNX Runtime
            return self._as_convolutions(maps)
        return self._as_products(maps)

    def _as_convolutions(self, maps: torch.Tensor) -> torch.Tensor:
        channels = maps.permute(1, 2, 0, 3).flatten(0, 1)
        predicted = self.narrow(self.widen(channels).relu())
        return predicted.unflatten(0, maps.shape[1:3]).permute(2, 0, 1, 3)

    def _as_products(self, maps: torch.Tensor) -> torch.Tensor:
        """Each convolution as one matrix product over all rows: with so few channels, half the time of torch's."""
        kernel, heads, tokens = self.kernel, self.heads, maps.shape[-1]
        padded, width = F.pad(maps, (kernel - 1, kernel - 1)), tokens + kernel - 1
        shifted = torch.stack([padded[..., tap : tap + width] for tap in range(kernel)], 1).reshape(heads * kernel, -1)
        hidden = torch.addmm(self.widen.bias[:, None], self.widen.weight.flatten(1), shifted).relu_()
        taps = (self.narrow.weight.permute(2, 0, 1).flatten(0, 1) @ hidden).reshape(kernel, *maps.shape[:-1], width)
        return functools.reduce(torch.add, [part[..., tap : tap + tokens] for tap, part in enumerate(taps)])

    def log_maps(self, maps: torch.Tensor) -> torch.Tensor:
        """Log of rows of the next layer's predicted attention maps: (H, B, R, N) → the same shape, each row
        a distribution."""
        return self.logits(maps).log_softmax(-1)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """What ``read`` gave, (H, B, R, N) → (B, H, N), column sums of the predicted maps over the query rows
        that were read: how much attention each token will receive."""
        # All rows at once would need many times the memory of the model itself; an exported graph cannot loop.
        portions = [maps] if torch.compiler.is_exporting() else maps.split(ROWS_AT_ONCE, 2)
        return sum(self.logits(portion).softmax(-1).sum(2) for portion in portions).transpose(0, 1)
