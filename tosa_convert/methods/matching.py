"""Pure tensor functions that find redundant tokens, and for each a token that can stand in for it.

On a grid of patches the tokens that may stand in for others are thinned out step by step, like the levels
of an image pyramid: every second one (a checkerboard), every fourth (one of each 2×2 window), every eighth
and so on. The tokens that a step leaves out are matched with those it keeps, so that a smooth region
can shrink to few tokens while each token of a detailed one stays.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from tosa_convert.base.errors import TosaError
from tosa_convert.methods.token_ops import (
    RATIO_STEPS,
    Choice,
    gather_tokens,
    is_none,
    leading,
    ordered,
    pick,
    put,
    wide,
)

SKETCHED = 1536
"""A token of D channels is compared by D² / 1536 numbers, see :func:`sketch`: the cost is then the same share of a
layer's at every width."""
FEWEST = 64
"""Numbers that it is compared by at least, if it has as many channels."""


class Pyramid(NamedTuple):
    """Patches from coarse to fine.

    Attributes:
        order: (N,) positions on the grid in reading order; the first ``counts[-1]`` are the coarsest level.
        counts: how many patches each thinning keeps, from the finest to the coarsest.
    """

    order: torch.Tensor
    counts: list[int]


def thinnings(steps: int) -> int:
    """How often the patches are thinned out for a keep ratio: once more than the ratio needs."""
    return 1 + math.ceil(math.log2(RATIO_STEPS / steps))


def pyramid(
    sides: tuple[int, ...], levels: int, most: int | None = None, device: torch.device | None = None
) -> Pyramid:
    """A grid of any number of axes, thinned out ``levels`` times, and further until at most ``most`` patches are left.

    Its sides may be symbolic; ``most`` must be an int or None then.
    """
    sides = tuple(sides)
    if all(isinstance(side, int) for side in sides):
        return _remembered(
            ("pyramid", sides, levels, most, device), lambda: _known_pyramid(sides, levels, most, device)
        )
    # Not by dividing positions: the remainder by a symbolic number does not export.
    places = [
        torch.arange(side, device=device).reshape(-1, *[1] * (len(sides) - axis - 1)).expand(sides).reshape(-1)
        for axis, side in enumerate(sides)
    ]
    depth, counts = _thinned(places, sides, levels, None)
    return Pyramid(ordered(depth, descending=True).indices, counts)


_KNOWN: dict = {}


def _remembered(key: tuple, make: Callable):
    """What does not depend on the images is computed once, by numpy, so that it is a constant in every traced graph,
    whatever ran before. It is not kept while a graph is traced: its tensors may not be real."""
    if key in _KNOWN:
        return _KNOWN[key]
    with torch.inference_mode(False):  # kept beyond this forward pass
        made = make()
    if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        if len(_KNOWN) >= 256:
            _KNOWN.clear()
        _KNOWN[key] = made
    return made


def _known_pyramid(sides: tuple[int, ...], levels: int, most: int | None, device: torch.device | None) -> Pyramid:
    left, places = np.arange(math.prod(sides)), []
    for side in reversed(sides):  # np.unravel_index does not compile
        places.insert(0, left % side)
        left = left // side
    depth, counts = _thinned(places, sides, levels, most)
    return Pyramid(torch.from_numpy(np.argsort(-depth, kind="stable")).to(device), counts)


def _thinned(places, sides, levels: int, most: int | None):
    """How many thinnings each patch outlives, and how many patches each leaves; arrays of numpy or of torch.

    Args:
        places: of all patches, axis by axis.
    """
    depth, counts, level = places[0] * 0, [], 0
    while level < levels or (most is not None and counts[-1] > most):
        stays, count = _stays(places, sides, level)
        depth = depth + 1 * stays
        counts.append(count)
        level += 1
    return depth, counts


def _stays(places, sides, level: int):
    """Which patches the level-th thinning keeps, and how many. On a grid of two axes: by turns a checkerboard of the
    grid that is left, and one of each 2×2 window of it. On one of three, where the first is time: a checkerboard in all
    three, every second time and a checkerboard in space, one of each 2×2×2 block."""
    step, halved = 2 ** (level // len(sides)), level % len(sides)
    whole = halved == len(sides) - 1
    steps = [step * (2 if whole or axis < halved else 1) for axis in range(len(sides))]
    # ONNX divides negatives otherwise.
    left = [(side + by - 1) // by for side, by in zip(sides, steps, strict=True)]
    stays = places[0] % steps[0] == 0
    for place, by in zip(places[1:], steps[1:], strict=True):
        stays = stays & (place % by == 0)
    if whole:
        return stays, math.prod(left)
    fine = sum(place // by for place, by in zip(places[halved:], steps[halved:], strict=True))
    return stays & (fine % 2 == 0), math.prod(left[:halved]) * ((math.prod(left[halved:]) + 1) // 2)


def features_of(tokens: torch.Tensor, normed: torch.Tensor, by: str = "normed") -> torch.Tensor:
    """(B, N, D) tokens before and after a norm → (B, N, fewer), by whose distances tokens are compared.

    Args:
        by: "normed" is half-way (geometric mean) between the distances of the tokens and those of the normed tokens,
            "tokens" half-way between those of the tokens and of their directions.
    """
    tokens, normed = tokens.float(), normed.float()  # squares of large tokens would overflow in half precision
    lengths = tokens.norm(dim=-1, keepdim=True).sqrt()
    return sketch(normed) * lengths if by == "normed" else sketch(tokens) / lengths.clamp(min=1e-6)


def apart(features: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    """Features (B, N, D) with those of tokens that are none, (B, N), all alike, and farther from the others than these
    are from each other."""
    if padding is None:
        return features
    largest = features.abs().masked_fill(padding[..., None], 0).amax((1, 2), keepdim=True)
    return torch.where(padding[..., None], 4 * largest, features)


def sketch(tokens: torch.Tensor) -> torch.Tensor:
    """(B, N, D) → (B, N, about D² / 1536): sums of channels far apart under fixed signs. Distances between tokens are
    kept roughly (a random projection), at the price of D additions per token."""
    width = tokens.shape[-1]
    group = max(1, width // max(FEWEST, width**2 // SKETCHED))
    device, dtype = tokens.device, tokens.dtype
    signed = tokens * _remembered(("signs", width, device, dtype), lambda: _signs(width, device, dtype))
    if width % group:
        signed = F.pad(signed, (0, -width % group))
    return signed.unflatten(-1, (group, -1)).sum(-2)


def _signs(width: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    channel = np.arange(width)
    return torch.from_numpy(1 - 2 * ((channel * 40503 + 32768) % 65536 // 128 % 2)).to(device, dtype)


def choose_redundant(features: torch.Tensor, prefix: int, grid: Pyramid, kept: int, partners: bool = True) -> Choice:
    """Skip the patches that another one can stand in for at the least distance; the nearest one that attends does.

    Args:
        features: (B, prefix + N, D); close features (Euclidean) mean that one token can stand in for the other.
        prefix: number of leading tokens that are no patches.
        grid: the pyramid of the N patches, on the same device.
        kept: how many patches attend; the coarsest level of the pyramid always does.
        partners: whether they are asked for.
    """
    batch, coarsest, patches = features.shape[0], grid.counts[-1], grid.order.shape[0]
    places = grid.order + prefix
    ranked = features.index_select(1, places)
    lengths = ranked.square().sum(-1)
    always = torch.arange(coarsest, device=features.device).expand(batch, coarsest)
    distances = _distances(ranked, lengths, grid)
    closest = ordered(distances).indices + coarsest
    skipped, finest = closest.split([patches - kept, kept - coarsest], dim=1)  # slices would lose symbolic lengths
    attended = torch.cat([always, finest], dim=1)
    found = None
    if partners:
        near = nearest(gather_tokens(ranked, skipped), gather_tokens(ranked, attended), pick(lengths, attended))
        found = near.indices + prefix
    everyone = torch.cat([attended, skipped], dim=1)
    located = places.index_select(0, everyone.reshape(-1)).reshape(everyone.shape)
    attended, skipped = located.split([kept, patches - kept], dim=1)
    return Choice(torch.cat([leading(features, prefix), attended], dim=1), skipped, found)


def _distances(ranked: torch.Tensor, lengths: torch.Tensor, grid: Pyramid) -> torch.Tensor:
    """Features in the pyramid's order, (B, N, D), and their squared lengths → squared distances of those that are not
    on its coarsest level to the nearest one on a coarser level than their own, (B, N − coarsest)."""
    patches, coarsest, nearness = grid.order.shape[0], grid.counts[-1], []
    for finer, count in reversed(list(zip([patches, *grid.counts[:-1]], grid.counts, strict=True))):
        # Narrowed, not sliced: one operator in a graph, where a slice is two.
        those, others = ranked.narrow(1, count, finer - count), ranked.narrow(1, 0, count)
        nearness.append(nearest(those, others, lengths.narrow(1, 0, count)).values)
    return lengths.narrow(1, coarsest, patches - coarsest) - 2 * torch.cat(nearness, dim=1)


def losses_if_skipped(features: torch.Tensor, prefix: int, grid: Pyramid) -> torch.Tensor:
    """(B, prefix + N, D) → (B, prefix + N): the squared distance by which :func:`choose_redundant` orders the patches,
    infinite for those that always attend."""
    batch, coarsest = features.shape[0], grid.counts[-1]
    ranked = features.index_select(1, grid.order + prefix)
    distances = _distances(ranked, ranked.square().sum(-1), grid)
    whole = torch.cat([distances.new_full((batch, coarsest), float("inf")), distances], dim=1)
    back = torch.argsort(grid.order)
    return torch.cat([whole.new_full((batch, prefix), float("inf")), whole.index_select(1, back)], dim=1)


def nearest(tokens: torch.Tensor, others: torch.Tensor, their_lengths: torch.Tensor):
    """(B, N, D) and (B, M, D), with the squared lengths of the latter → for each token how near the nearest of the
    others is (``values``; its own squared length less twice that is the squared distance), and which one it is
    (``indices``), both (B, N)."""
    return (tokens @ others.mT - (0.5 * their_lengths).unsqueeze(1)).max(-1)


def match(features: torch.Tensor, prefix: int, choice: Choice) -> Choice:
    """The same choice with partners: for each skipped token the nearest attending patch by ``features``, (B, N, D)."""
    skipped, attended = (gather_tokens(features, places) for places in (choice.skipped, choice.attended[:, prefix:]))
    nearest_one = nearest(skipped, attended, attended.square().sum(-1)).indices
    return choice._replace(partners=nearest_one + prefix)


def _everyone(batch: int, count: int, device: torch.device) -> Choice:
    """That all tokens attend."""
    places = torch.arange(count, device=device).expand(batch, count)
    return Choice(places, places[:, :0], places[:, :0])


def choose_bipartite(features: torch.Tensor, prefix: int, kept: int) -> Choice:
    """Bipartite soft matching (ToMe, arXiv 2210.09461, section 3.2): the tokens alternate between two sets,
    and those of the first that are most similar to one of the second (cosine) are skipped.

    Args:
        features: (B, prefix + N, D), in the paper the mean of the keys over the heads.
        kept: how many patches attend; the second set always does.

    The attended tokens come in the paper's order, on which its next matching depends: the rest of the
    first set in order, then the second.
    """
    batch, count, _ = features.shape
    features = F.normalize(wide(features), dim=-1)
    start = prefix + prefix % 2  # the first token of the first set that is no prefix token
    first, second = features[:, start::2], features[:, 1::2]
    hidden = prefix // 2  # prefix tokens that would be in the second set
    if is_none(second.shape[1] - hidden):  # of the one patch that is left
        return _everyone(batch, count, features.device)
    similarity, partner = (first @ second[:, hidden:].mT).max(-1)
    surplus = count - prefix - kept
    order = ordered(similarity, descending=True).indices
    closest, rest = order[:, :surplus], torch.sort(order[:, surplus:], dim=1).values
    ones = torch.arange(1 + 2 * hidden, count, 2, device=features.device).expand(batch, -1)
    attended = torch.cat([leading(features, prefix), rest * 2 + start, ones], dim=1)
    return Choice(attended, closest * 2 + start, pick(partner, closest) + prefix + rest.shape[1])


def choose_by_energy(features: torch.Tensor, prefix: int, kept: int, margin: float) -> Choice:
    """Energy-based bipartite matching (PiToMe, arXiv 2405.16148, section 3.2): of the patches with the highest energy,
    twice as many as are skipped, every second one is skipped for the nearest of the others; the rest is left alone.

    Args:
        features: (B, prefix + N, D), in the paper the mean of the keys over the heads.
        kept: how many patches attend, at least half of them.
        margin: from which cosine on tokens count as similar.

    Raises:
        TosaError: fewer than half are to attend.
    """
    batch, count, _ = features.shape
    patches = count - prefix
    surplus = patches - kept
    if isinstance(surplus, int) and 2 * surplus > patches:
        raise TosaError(
            f"score energy skips at most half of the patches of a layer, not {surplus} of {patches}; raise the ratio"
        )
    if is_none(surplus):
        return _everyone(batch, count, features.device)
    units = F.normalize(wide(features.narrow(1, prefix, patches)), dim=-1)
    pairs, alone = ordered(energy_of(units, margin), descending=True).indices.split(
        [2 * surplus, patches - 2 * surplus], dim=1
    )
    skipped, others = pairs.reshape(batch, surplus, 2).unbind(-1)
    nearest_one = (gather_tokens(units, skipped) @ gather_tokens(units, others).mT).argmax(-1)
    attended = torch.cat([leading(features, prefix), others + prefix, alone + prefix], dim=1)
    return Choice(attended, skipped + prefix, nearest_one + prefix)


def energy_of(units: torch.Tensor, margin: float, absent: torch.Tensor | None = None) -> torch.Tensor:
    """(B, N, D) of length one → (B, N), the mean similarity of each token to all but the absent, (B, N); cosines below
    the margin count little."""
    cosines = units @ units.mT
    each = torch.where(cosines >= margin, cosines, (cosines - margin).exp() - 1)
    if absent is None:
        return each.mean(-1)
    return each.masked_fill(absent[:, None], 0).sum(-1) / (~absent).sum(-1, keepdim=True).clamp(min=1)


def choose_both_ways(weights: torch.Tensor, prefix: int, kept: int) -> Choice:
    """Bidirectional bipartite soft matching (MCTF, arXiv 2403.10030, section 3.3): the patches alternate between two
    sets; those of the first with the heaviest pairs are skipped for their partners in the second, then as many of the
    second for those that are left of the first.

    Args:
        weights: (B, ⌈N / 2⌉, ⌊N / 2⌋) of the pairs of patches 0, 2, 4 … and 1, 3, 5 ….
        kept: how many patches attend, at least half of them.

    The way back goes by the same weights, as in the paper; a token for which another one was skipped can be skipped
    itself, and its partner then stands in for both. The tokens that attend keep their order.
    """
    batch, ones, others = weights.shape
    surplus = ones + others - kept
    if is_none(surplus):
        return _everyone(batch, prefix + kept, weights.device)
    there, back = surplus - surplus // 2, surplus // 2
    best, partner = weights.max(-1)
    gone, left = ordered(best, descending=True).indices.split([there, ones - there], dim=1)
    seconds = torch.arange(others, device=weights.device).expand(batch, others)
    # Where each of the second set ends up; those of the first follow them.
    returned, stayed, second = seconds[:, :0], seconds, seconds * 2 + 1
    if not is_none(back):
        best, mate = gather_tokens(weights, left).max(1)
        returned, stayed = ordered(best, descending=True).indices.split([back, others - back], dim=1)
        second = put(second, returned, pick(left * 2, pick(mate, returned)))
    attended = torch.sort(torch.cat([left * 2, stayed * 2 + 1], dim=1), dim=1).values
    ranks = torch.arange(kept, device=weights.device).expand(batch, kept)
    rank = put(torch.zeros(batch, ones + others, dtype=torch.long, device=weights.device), attended, ranks)
    into = torch.cat([pick(second, pick(partner, gone)), pick(second, returned)], dim=1)
    skipped = torch.cat([gone * 2, returned * 2 + 1], dim=1) + prefix
    everyone = torch.cat([leading(weights, prefix), attended + prefix], dim=1)
    return Choice(everyone, skipped, pick(rank, into) + prefix)
