"""Choices of as many tokens as each image needs. Pure tensor functions, as in :mod:`tosa_convert.methods.token_ops`.

The images of a batch then keep different numbers of tokens, which make no tensor with one row per image. So the batch
is taken as one long row, image after image: its tokens are (1, B·N, D), and a choice names places in that row. What
takes tokens out and puts them back works on it as on a single image; only what looks from token to token has to stay
within each image. A batch of one is its own row.
"""

import torch

from tosa_convert.base.errors import TosaError
from tosa_convert.methods.matching import match, nearest
from tosa_convert.methods.token_ops import Choice, Packed, is_one, ordered, pick


def choose_above(scores: torch.Tensor, prefix: int, threshold: float, most: int | None = None) -> Choice:
    """Every prefix token attends, and the patch tokens whose score is at least a threshold: of them the ``most`` best,
    where that is given, and in any case the best.

    Args:
        scores: (B, N), one per token; those of prefix tokens are not looked at.

    Returns:
        A choice in the row of the batch, in the order of the tokens.
    """
    batch, count = scores.shape
    patches = scores.narrow(1, prefix, count - prefix)
    attends = (patches >= threshold).scatter(1, patches.argmax(1, keepdim=True), True)
    if most is not None:
        best = ordered(patches, descending=True).indices.narrow(1, 0, most)
        attends = attends & torch.zeros_like(attends).scatter(1, best, True)
    attends = torch.cat([attends.new_ones(batch, prefix), attends], dim=1)
    return in_a_row(attends)


def in_a_row(attends: torch.Tensor) -> Choice:
    """(B, N), whether each token attends → the choice, in the row of the batch."""
    batch, count = attends.shape
    if torch.jit.is_tracing():
        raise TosaError("a conversion with a threshold cannot be traced; use torch.export or torch.compile")
    if torch.compiler.is_exporting() and not is_one(batch):
        raise TosaError("a conversion with a threshold is exported for one image at a time; give an example of batch 1")
    flat = attends.reshape(-1)
    attended, skipped = flat.nonzero()[:, 0], flat.logical_not().nonzero()[:, 0]
    if torch.compiler.is_exporting():  # what cannot be seen from the operators
        torch._check(attended.shape[0] >= 2)
        torch._check(attended.shape[0] + skipped.shape[0] == flat.shape[0])
    packed = None
    if not is_one(batch):
        packed = Packed(tuple(attends.sum(1).tolist()), (attended % count)[None])
    return Choice(attended[None], skipped[None], packed=packed)


def as_row(values: torch.Tensor | None, choice: Choice) -> torch.Tensor | None:
    """(B, N, …) → (1, B·N, …) where the choice is of the row of a batch."""
    return values if values is None or choice.packed is None else values.flatten(0, 1)[None]


def match_in_row(features: torch.Tensor, prefix: int, choice: Choice) -> Choice:
    """A choice with partners: for each skipped token the nearest attending patch of its image.

    Args:
        features: (B, N, D), see :func:`~tosa_convert.methods.matching.match`.
    """
    if choice.packed is None:
        return match(features, prefix, choice)
    batch, count, _ = features.shape
    attends = torch.zeros(batch * count, dtype=torch.bool, device=features.device)
    attends[choice.attended[0]] = True
    rank = attends.cumsum(0) - 1
    patches = features.narrow(1, prefix, count - prefix)
    lengths = patches.square().sum(-1)
    absent = ~attends.reshape(batch, count)[:, prefix:]
    near = nearest(features, patches, lengths.masked_fill(absent, float("inf"))).indices + prefix
    first = torch.arange(batch, device=features.device)[:, None] * count
    return choice._replace(partners=pick(rank[None], pick((near + first).reshape(1, -1), choice.skipped)))


def by_image(choice: Choice) -> list[torch.Tensor]:
    """The tokens that attend, (K,) positions in each image in turn."""
    if choice.packed is None:
        return list(choice.attended)
    return list(choice.packed.places[0].split(choice.packed.lengths))
