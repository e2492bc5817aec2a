"""Pure tensor functions on tokens: how many, which, take out, put back. No modules, no model names.

Everything here keeps batch and token count symbolic, so that one conversion runs, traces and
exports at any batch size and image size.
"""

import math
from typing import NamedTuple

import torch

RATIO_STEPS = 10_000
"""Keep ratios are held as whole ten-thousandths: K then follows from integers alone."""


def ratio_steps(ratio: float) -> int:
    """A keep ratio in (0, 1] as whole ten-thousandths, at least one."""
    return max(1, round(ratio * RATIO_STEPS))


def keep_count(patches: int, steps: int) -> int:
    """K = ⌈ratio · patches⌉ in integer arithmetic: exact at every size, and never zero.

    ``patches`` may be symbolic (``torch.export``) or a traced 0-d tensor (fvcore): only ``*``,
    ``+`` and ``//`` touch it.
    """
    return (patches * steps + (RATIO_STEPS - 1)) // RATIO_STEPS


class Packed(NamedTuple):
    """How the tokens that attend lie in the row of a batch, see :mod:`tosa_convert.methods.packing`.

    Attributes:
        lengths: how many there are of each image, which follow one another.
        places: (1, K) where each of them is within its image.
    """

    lengths: tuple[int, ...]
    places: torch.Tensor


class Choice(NamedTuple):
    """What one layer does with its tokens, as positions within each image; or within the row of the whole batch, where
    the images keep different numbers of tokens.

    Attributes:
        attended: (B, K) tokens that run the layer, prefix tokens first.
        skipped: (B, S) the others.
        partners: (B, S) who stands in for each skipped token, as an index into ``attended``; None
            where none does.
        padding: (B, N) which tokens are none: nobody looks at them. None where all are tokens.
        weights: (B, N) how much each token counts in the mean of its group; None where they count alike.
        packed: how the images of a batch lie in a row; None where each has a row of its own, as B images or as one.
    """

    attended: torch.Tensor
    skipped: torch.Tensor
    partners: torch.Tensor | None = None
    padding: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    packed: Packed | None = None


def choose_best(scores: torch.Tensor, prefix: int, kept: int) -> Choice:
    """Every prefix token attends, then the ``kept`` best patch tokens.

    Args:
        scores: (B, N), one score per token; those of prefix tokens are not looked at.
        prefix: number of leading class, distillation and register tokens.
        kept: how many patch tokens attend, see :func:`keep_count`.

    Equal scores are ordered by position, so that torch and ONNX Runtime choose alike.
    """
    order = ordered(scores[:, prefix:], descending=True).indices + prefix
    return Choice(torch.cat([leading(scores, prefix), order[:, :kept]], dim=1), order[:, kept:])


def without_padding(scores: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    """Scores (B, N) with those of tokens that are none, (B, N), below all others."""
    return scores if padding is None else scores.masked_fill(padding, float("-inf"))


def ordered(values: torch.Tensor, descending: bool = False):
    """(B, N) sorted along the last dimension, equal values by position: (values, indices)."""
    if torch.compiler.is_exporting():
        # ONNX has no stable sort by name, but its TopK, which a plain sort becomes, puts the lower index first on ties.
        return torch.sort(values, dim=-1, descending=descending)
    return torch.sort(values, dim=-1, descending=descending, stable=True)


def leading(like: torch.Tensor, prefix: int) -> torch.Tensor:
    """(B, prefix): the positions of the prefix tokens in each image of a batch like (B, …)."""
    return torch.arange(prefix, device=like.device).expand(like.shape[0], prefix)


def flat_positions(tokens: int, *each: torch.Tensor) -> list[torch.Tensor]:
    """(B, K) positions within each image, several times → (B·K,) rows of the (B·N, D) matrix of all tokens."""
    batch = each[0].shape[0]
    if is_one(batch):
        return [positions.reshape(-1) for positions in each]
    first_rows = (torch.arange(batch, device=each[0].device) * tokens).unsqueeze(1)
    return [(positions + first_rows).reshape(-1) for positions in each]


def is_one(batch: int) -> bool:
    """Whether a batch holds a single image; never of a symbolic batch, which must not be decided on."""
    return isinstance(batch, int) and batch == 1


def is_none(count: int) -> bool:
    """Whether a number of tokens is zero; ONNX Runtime reshapes no empty tensors. Never of a symbolic number."""
    return isinstance(count, int) and count == 0


def gather_tokens(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """(B, N, D) and (B, K) → (B, K, D). A flat index_select: the fastest form in ONNX Runtime."""
    batch, count, width = tokens.shape
    (rows,) = flat_positions(count, positions)
    # No −1 in the shape: positions may be none at all.
    return tokens.reshape(batch * count, width).index_select(0, rows).reshape(batch, positions.shape[1], width)


def rejoin_tokens(tokens: torch.Tensor, positions: torch.Tensor, updated: torch.Tensor) -> torch.Tensor:
    """(B, N, D) with the rows at ``positions`` (B, K) replaced by ``updated`` (B, K, D); order kept."""
    batch, count, width = tokens.shape
    (rows,) = flat_positions(count, positions)
    everything = tokens.reshape(batch * count, width)
    joined = everything.index_copy(0, rows, updated.reshape(-1, width).to(tokens.dtype))
    return joined.reshape(batch, count, width)


def pick(values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """(B, N) numbers and (B, K) positions → (B, K)."""
    (rows,) = flat_positions(values.shape[1], positions)
    return values.reshape(-1).index_select(0, rows).reshape(positions.shape)


def put(values: torch.Tensor, positions: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """(B, N) with the entries at ``positions`` (B, K) replaced by ``numbers`` (B, K)."""
    (rows,) = flat_positions(values.shape[1], positions)
    return values.reshape(-1).index_copy(0, rows, numbers.reshape(-1)).reshape(values.shape)


def stand_ins(choice: Choice) -> torch.Tensor:
    """(B, N): for each token the index into ``choice.attended`` of itself, or of its partner."""
    attended, skipped, partners = choice[:3]
    own = torch.arange(attended.shape[1], device=attended.device).expand(attended.shape)
    everyone = torch.cat([attended, skipped], dim=1)
    return put(torch.zeros_like(everyone), everyone, torch.cat([own, partners], dim=1))


def wide(values: torch.Tensor) -> torch.Tensor:
    """Half precision as float32: sums over many tokens overflow in float16 and stall in bfloat16, and what is compared
    has ties in both. Anything else stays as it is."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def add_up(choice: Choice, *each: torch.Tensor) -> list[torch.Tensor]:
    """(B, N, D) → (B, K, D), of each of several: each attended token plus those it stands in for."""
    (batch, tokens, _), count = each[0].shape, choice.attended.shape[1]
    attended, skipped = flat_positions(tokens, choice.attended, choice.skipped)
    partners = None if is_none(choice.skipped.shape[1]) else flat_positions(count, choice.partners)[0]

    def summed(some: torch.Tensor) -> torch.Tensor:
        everything = some.reshape(batch * tokens, some.shape[-1])
        found = everything.index_select(0, attended)
        if partners is not None:
            found = found.index_add(0, partners, everything.index_select(0, skipped))
        return found.reshape(batch, count, some.shape[-1])

    return [summed(some) for some in each]


def spread_rows(tokens: int, prefix: int, rows: int) -> torch.Tensor:
    """Positions of ``rows`` tokens that stand for all of them: the first prefix token, if there is one, then
    patches at even strides along the reading order, shifted by the golden ratio across it.

    A plain stride meets the same few columns of the grid again and again, depending on its width; this
    (a Fibonacci lattice) covers both directions at every number of rows. The grid is taken to be
    square; on another one the positions are still spread. Integer arithmetic: the same in ONNX. Where
    ``rows`` comes near the number of tokens some positions come twice, and count twice.
    """
    if isinstance(tokens, int):
        return torch.tensor(_spread_rows(tokens, prefix, rows))
    patches, leading = tokens - prefix, min(prefix, 1)
    side = (torch.arange(patches) ** 2 < patches).sum()  # ⌈√patches⌉ of a symbolic number of patches
    chosen = _lattice(torch.arange(rows - leading), rows - leading, side, patches) + prefix
    return torch.cat([torch.zeros(leading, dtype=torch.long), chosen])


def _spread_rows(tokens: int, prefix: int, rows: int) -> list[int]:
    """:func:`spread_rows` of a known number of tokens, without a dozen small tensor operations in each forward pass."""
    patches, leading = tokens - prefix, min(prefix, 1)
    side, count = math.isqrt(patches - 1) + 1, rows - leading
    return [0] * leading + [_lattice(index, count, side, patches) + prefix for index in range(count)]


def _lattice(index, count: int, side, patches):
    """The index-th of ``count`` patches; integers or integer tensors."""
    down = (2 * index + 1) * side // (2 * count)
    across = (index * 40503 + 32768) % 65536 * side // 65536  # 40503 / 65536 is the golden ratio's fraction
    return (down * side + across) * patches // side**2


def random_rows(tokens: int, prefix: int, rows: int) -> torch.Tensor:
    """As :func:`spread_rows`, with patches drawn at random without repetition, from torch's generator."""
    leading = min(prefix, 1)
    drawn = torch.randperm(tokens - prefix)[: rows - leading] + prefix
    return torch.cat([torch.zeros(leading, dtype=torch.long), drawn])
