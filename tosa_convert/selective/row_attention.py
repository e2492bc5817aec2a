"""Attention over a row of several images, each attending within itself."""

import torch
import torch.nn.functional as F

WIDTH = 8  # fused kernels want the channels of a head in multiples of it


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    mask: torch.Tensor | None = None,
    **options,
) -> torch.Tensor:
    """``scaled_dot_product_attention`` of (1, H, K, C) each, within every image, the way that was measured to be the
    quickest on the device (``benchmarks/packing.py``).

    Args:
        lengths: how many tokens there are of each image, in the order of the row.
        mask: what is added to the logits, (1, H or 1, K or 1, K).
        options: of ``scaled_dot_product_attention``.
    """
    nests = (mask is None or mask.shape[-2] == 1) and query.shape[1] == key.shape[1]
    way = jagged if query.is_cuda and nests and len(lengths) > 1 else one_by_one
    return way(query, key, value, lengths, mask, **options)


def one_by_one(query, key, value, lengths: tuple[int, ...], mask: torch.Tensor | None = None, **options):
    """:func:`attend` by one call for each image."""
    parts = zip(*(each.split(lengths, dim=-2) for each in (query, key, value)), strict=True)
    masks = _parted(mask, lengths)
    found = [
        F.scaled_dot_product_attention(*qkv, attn_mask=own, **options) for qkv, own in zip(parts, masks, strict=True)
    ]
    return torch.cat(found, dim=-2)


def _parted(mask: torch.Tensor | None, lengths: tuple[int, ...]) -> list[torch.Tensor | None]:
    if mask is None:
        return [None] * len(lengths)
    columns = mask.split(lengths, dim=-1)
    if mask.shape[-2] == 1:
        return list(columns)
    return [rows.split(lengths, dim=-2)[index] for index, rows in enumerate(columns)]


def jagged(query, key, value, lengths: tuple[int, ...], mask: torch.Tensor | None = None, **options):
    """:func:`attend` by one call on nested tensors, which take no mask: what is added to the logits of a key is worked
    into the product, as one more channel.

    Args:
        mask: (1, H or 1, 1, K).
    """
    channels, scale = value.shape[-1], options.pop("scale", None)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    device = query.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    tokens = [each[0].transpose(0, 1).to(kind) for each in (query, key, value)]  # (K, H, C)
    if mask is not None:
        added = (mask[0].permute(2, 0, 1).expand(-1, query.shape[1], -1) / scale).to(kind)
        more = (torch.ones_like(added), added, torch.zeros_like(added))
        tokens = [F.pad(torch.cat(pair, dim=-1), (0, WIDTH - 1)) for pair in zip(tokens, more, strict=True)]
    offsets = torch.tensor([0, *lengths], device=query.device).cumsum(0)
    nested = [
        torch.nested.nested_tensor_from_jagged(
            each.contiguous(), offsets, min_seqlen=min(lengths), max_seqlen=max(lengths)
        ).transpose(1, 2)
        for each in tokens
    ]
    found = F.scaled_dot_product_attention(*nested, scale=scale, **options)
    return found.transpose(1, 2).values()[..., :channels].transpose(0, 1)[None]
