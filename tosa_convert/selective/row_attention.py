"""Attention over a row of several images, each attending within itself."""

import torch
import torch.nn.functional as F

STEP = 16
"""Padded rows are as long as a multiple of it: kernels are prepared anew for each length, and want an even one."""


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    mask: torch.Tensor | None = None,
    **options,
) -> torch.Tensor:
    """``scaled_dot_product_attention`` of (1, H, K, C) each, in the way that was measured to be the fastest there
    (benchmarks/packing.py): on a GPU by one call for all images, otherwise by one for each.

    Args:
        lengths: how many tokens there are of each image, in the order of the row.
        mask: what is added to the logits, (1, H or 1, K or 1, K).
        options: of ``scaled_dot_product_attention``.
    """
    way = attend_at_once if query.is_cuda else attend_by_image
    return way(query, key, value, lengths, mask, **options)


def attend_by_image(query, key, value, lengths: tuple[int, ...], mask=None, **options) -> torch.Tensor:
    """:func:`attend` by a call for each image."""
    parts = zip(*(each.split(lengths, dim=-2) for each in (query, key, value)), strict=True)
    masks = _parted(mask, lengths)
    found = [
        F.scaled_dot_product_attention(*qkv, attn_mask=own, **options) for qkv, own in zip(parts, masks, strict=True)
    ]
    return torch.cat(found, dim=-2)


def attend_at_once(query, key, value, lengths: tuple[int, ...], mask=None, **options) -> torch.Tensor:
    """:func:`attend` by one call, padded to the longest image."""
    inside, taken, back = (each.to(query.device, non_blocking=True) for each in _places(lengths))
    return attend_in_rows(query, key, value, mask, taken, inside[:, None, None], back, **options)


def attend_in_rows(query, key, value, mask, taken, seen, back, **options) -> torch.Tensor:
    """``scaled_dot_product_attention`` of (1, H, K, C) each by one call, with their tokens in C rows of L places.

    Args:
        mask: what is added to the logits, (1, H or 1, K or 1, K), or None.
        taken: (C, L), the token in each place; where none belongs, any.
        seen: (C, 1, L or 1, L), whether a place sees another.
        back: (K,), the place of each token among all.
    """
    tokens = [each[0].index_select(1, taken.flatten()).unflatten(1, taken.shape) for each in (query, key, value)]
    if mask is not None:
        seen = _added(mask, taken).to(query.dtype).masked_fill(~seen, float("-inf"))
    found = F.scaled_dot_product_attention(*(each.transpose(0, 1) for each in tokens), attn_mask=seen, **options)
    return found.transpose(0, 1).flatten(1, 2).index_select(1, back)[None]


def _added(mask: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """(C, H or 1, L or 1, L)."""
    if mask.shape[-2] == 1:
        return mask[0][..., taken].permute(2, 0, 1, 3)
    return mask[0][:, taken[:, :, None], taken[:, None]].transpose(0, 1)


def _places(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which places of images that are padded to the longest hold a token, (B, M); the token of a row in each place, or
    behind its image's last one that again, (B, M); and the place of each token of the row, (K,)."""
    counts, most = torch.tensor(lengths), -(-max(lengths) // STEP) * STEP
    first = counts.cumsum(0) - counts
    places = torch.arange(most).expand(len(lengths), -1)
    inside = places < counts[:, None]
    taken = first[:, None] + places.minimum(counts[:, None] - 1)
    image = torch.arange(len(lengths)).repeat_interleave(counts, output_size=sum(lengths))
    back = image * most + torch.arange(sum(lengths)) - first[image]
    return inside, taken, back


def _parted(mask: torch.Tensor | None, lengths: tuple[int, ...]) -> list[torch.Tensor | None]:
    """That of each image; copies, since kernels on a GPU fail on a mask that begins at an odd place of another."""
    if mask is None:
        return [None] * len(lengths)
    columns = mask.split(lengths, dim=-1)
    if mask.shape[-2] == 1:
        return [each.clone() for each in columns]
    return [rows.split(lengths, dim=-2)[index].clone() for index, rows in enumerate(columns)]
