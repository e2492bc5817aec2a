"""Attention over a row of several images, each attending within itself."""

import torch
import torch.nn.functional as F


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    mask: torch.Tensor | None = None,
    **options,
) -> torch.Tensor:
    """``scaled_dot_product_attention`` of (1, H, K, C) each, by one call for each image.

    Args:
        lengths: how many tokens there are of each image, in the order of the row.
        mask: what is added to the logits, (1, H or 1, K or 1, K).
        options: of ``scaled_dot_product_attention``.
    """
    parts = zip(*(each.split(lengths, dim=-2) for each in (query, key, value)), strict=True)
    masks = _parted(mask, lengths)
    found = [
        F.scaled_dot_product_attention(*qkv, attn_mask=own, **options) for qkv, own in zip(parts, masks, strict=True)
    ]
    return torch.cat(found, dim=-2)


def _parted(mask: torch.Tensor | None, lengths: tuple[int, ...]) -> list[torch.Tensor | None]:
    """That of each image; copies, since kernels on a GPU fail on a mask that begins at an odd place of another."""
    if mask is None:
        return [None] * len(lengths)
    columns = mask.split(lengths, dim=-1)
    if mask.shape[-2] == 1:
        return [each.clone() for each in columns]
    return [rows.split(lengths, dim=-2)[index].clone() for index, rows in enumerate(columns)]
