"""What is added to an attention's logits: masks of padding, biases, the weights of groups."""

import torch

from tosa_convert.methods.token_ops import gather_tokens


def total(*biases: torch.Tensor | None) -> torch.Tensor | None:
    """The sum of those that there are."""
    given = [bias for bias in biases if bias is not None]
    return sum(given[1:], given[0]) if given else None


def weight_of(sizes: torch.Tensor | None) -> torch.Tensor | None:
    """For how many tokens each stands, (B, K) → (B, 1, 1, K): what lets it count as so many."""
    return None if sizes is None else sizes.log()[:, None, None, :]


def mask_at(mask: torch.Tensor, places: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """A mask for all pairs of tokens, (B or 1, 1, N or 1, N), true where one sees the other or what is added to the
    logits, and places among the tokens (B, K) → (B, 1, K or 1, K) that is added."""
    if not mask.is_floating_point():
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(
            ~mask.bool(), torch.finfo(dtype).min
        )
    if places is None:
        return mask
    pairs = mask.expand(len(places), -1, -1, -1)[:, 0]
    rows = gather_tokens(pairs, places) if pairs.shape[1] > 1 else pairs
    return gather_tokens(rows.mT, places).mT[:, None]
