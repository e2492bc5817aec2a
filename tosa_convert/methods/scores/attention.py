"""ToSA's token selector (arXiv 2406.08816, section 3): one layer's QKᵀ predicts the next layer's map."""

import functools
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, field_validator
from torch import nn

from tosa_convert.methods import parts
from tosa_convert.methods.score import Lesson, Score, Site, View
from tosa_convert.methods.token_ops import choose_best, random_rows, spread_rows

ROWS_AT_ONCE = 64
"""Query rows that are scored at a time, see :meth:`AttentionSelector.score`."""
ROWS_LEARNT_AT_ONCE = 16
"""Query rows of a selector that are learnt from at a time: keeps the peak of memory near that of a forward pass."""


def _query_rows(value: object) -> object:
    if value != "all" and (isinstance(value, bool) or not isinstance(value, int) or value < 2):
        raise ValueError(f"{value!r} is not a number of query rows; give 2 or more, such as 32, or all")
    return value


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


class AttentionSelector(Score):
    """Conv1d(H → hidden) → ReLU → Conv1d(hidden → H) → log-softmax, run along keys for each query row.

    The heads are the channels and the keys the axis of the convolutions, so the selector does not
    depend on the number of tokens. The paper names neither the width nor the kernel of the
    convolutions; ``hidden=None`` means two channels per head.

    Each query row is predicted on its own, so the column sums over a few rows stand for those over all:
    ``read`` computes no more of QKᵀ than is looked at. ``rows="all"`` is the paper's computation.

    It starts out predicting that the next layer attends as this one did (``relu(x) − relu(−x)``
    through the central taps), which distillation then improves on.
    """

    always_before = scores_heads = learns = ordinary_before = True

    class Options(parts.Options):
        """
        Attributes:
            rows: query rows from which the tokens are scored; the class token's is always one of them. "all" is the
                paper's computation and reads the whole L×L map. The default keeps within two points of its overlap
                with the real attention's choice (benchmarks/rows_overlap.py).
            hidden: channels of the hidden layer; None means two per head.
            kernel: width of the convolutions along the keys, odd.
        """

        rows: Annotated[int | Literal["all"], BeforeValidator(_query_rows)] = 32
        hidden: int | None = Field(default=None, ge=1)
        kernel: int = Field(default=3, ge=1)

        @field_validator("kernel")
        @classmethod
        def _odd(cls, value: int) -> int:
            if value % 2 == 0:
                raise ValueError("must be odd, so that the output keeps the number of keys")
            return value

    def setup(self, site: Site) -> None:
        heads, kernel = site.heads, self.options.kernel
        self.heads, self.kernel, self.prefix = heads, kernel, site.prefix
        self.rows = QueryKeyRows(site.prefix, self.options.rows)
        hidden = self.options.hidden or 2 * heads
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

    def read(self, queries: torch.Tensor, keys: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """(B, H, N, D) twice → the rows of QKᵀ that are looked at, (H, B, R, N)."""
        return self.rows(queries, keys, rows)

    def score(self, view: View) -> torch.Tensor:
        """The rows that were read, (H, B, R, N) → (B, H, N), column sums of the predicted maps over them: how much
        attention each token will receive."""
        # All rows at once would need many times the memory of the model itself; an exported graph cannot loop.
        maps = view.reading
        portions = [maps] if torch.compiler.is_exporting() else maps.split(ROWS_AT_ONCE, 2)
        return sum(self.logits(portion).softmax(-1).sum(2) for portion in portions).transpose(0, 1)

    def lesson(self, keep: Callable[[int], int], **settings: Any) -> "MapLesson":
        return MapLesson(self, keep, settings["kl"])


class MapLesson(Lesson):
    """The next layer's map is predicted from the layer before, and corrected as soon as that layer has projected its
    queries and keys, so that only a few rows of maps are ever kept."""

    def __init__(self, score: AttentionSelector, keep: Callable[[int], int], kl: str):
        super().__init__(score)
        self.keep, self.kl = keep, kl

    def listen(self, queries, keys):
        rows = self.score.rows.choose(keys.shape[2], random_rows)
        self.seen = self.score.read(queries, keys, rows), rows

    def learn(self, queries, keys):
        (maps, rows), self.seen = self.seen, None
        real = self.score.read(queries, keys, rows)
        with torch.enable_grad():  # the model around it runs without
            portions = zip(maps.split(ROWS_LEARNT_AT_ONCE, 2), real.split(ROWS_LEARNT_AT_ONCE, 2), strict=True)
            losses, predicted, wanted = zip(*(self._correct(*portion) for portion in portions), strict=True)
            loss = torch.stack(losses).sum() / maps.shape[2]
        prefix = self.score.prefix
        kept = self.keep(maps.shape[3] - prefix)
        self.figures = {"loss": loss, "overlap": overlap(sum(predicted), sum(wanted), prefix, kept)}

    def _correct(self, maps: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(H, B, R, N) twice → the loss, summed over query rows, and what each token receives in the predicted
        and in the real maps, (B, N)."""
        real, predicted = real.float().log_softmax(-1), self.score.log_maps(maps).float()
        loss = divergence(predicted, real) if self.kl == "reverse" else divergence(real, predicted)
        loss = with_gradient_now(loss * maps.shape[2], list(self.score.parameters()))
        return loss, predicted.detach().exp().sum((0, 2)), real.exp().sum((0, 2))


def with_gradient_now(loss: torch.Tensor, parameters: list[nn.Parameter]) -> torch.Tensor:
    """The same loss with the same gradient, taken at once: what it was computed from can be freed before
    the next rows and selectors have theirs."""
    gradients = torch.autograd.grad(loss, parameters)
    linear = sum((parameter * gradient).sum() for parameter, gradient in zip(parameters, gradients, strict=True))
    return loss.detach() + (linear - linear.detach())


def divergence(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Σ_heads KL(first ‖ second) of log maps (H, B, R, N), averaged over images and query rows."""
    return (first.exp() * (first - second)).sum(-1).sum(0).mean()


def overlap(predicted: torch.Tensor, real: torch.Tensor, prefix: int, kept: int) -> torch.Tensor:
    """Share of the patches chosen by one set of scores (B, N) that the other would choose too."""
    chosen, wanted = (choose_best(scores, prefix, kept).attended for scores in (predicted, real))
    marks = torch.zeros_like(real, dtype=torch.bool).scatter(1, wanted, True)
    return marks.gather(1, chosen)[:, prefix:].float().mean()
