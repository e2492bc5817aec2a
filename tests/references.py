"""What converted models are held against: the original, and the original with its tokens masked out."""

import copy
from contextlib import contextmanager, suppress

import torch
import torch.nn.functional as F
from timm.models.cait import TalkingHeadAttn
from torch import nn

from tosa_convert.base.errors import UsageError
from tosa_convert.models.adapter import adapter_of
from tosa_convert.models.proof.calls import first_of


def first(outputs: dict) -> torch.Tensor:
    return next(iter(outputs.values()))


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """To 1e-5 of the largest value: a depth head with random weights makes millions."""
    return torch.allclose(found, wanted, atol=1e-5 * max(1.0, wanted.abs().max().item()))


def sizes_of(model: nn.Module) -> list[tuple[int, int]]:
    """The model's own, and another one where the family allows it."""
    for other in ((48, 32), (48, 48)):
        with suppress(UsageError):
            adapter_of(copy.deepcopy(model)).resize(other)
            return [(32, 32), other]
    return [(32, 32)]


def mask_others(adapter, layer: int, chosen: torch.Tensor) -> None:
    block = adapter.blocks[layer - 1]
    forward = block.forward

    def masked(*args, **kwargs):
        tokens = adapter.entering(args, kwargs)[0]
        in_a_row = torch.zeros(adapter.taken(tokens).shape[:2], dtype=torch.bool).scatter(1, chosen, True)
        attends = adapter.restored(in_a_row[..., None], tokens)
        with _attending(block, attends[..., 0] if attends.ndim == 3 else in_a_row):
            updated = first_of(forward(*args, **kwargs))
        return adapter.given_back(torch.where(attends, updated, tokens))

    block.forward = masked


@contextmanager
def _attending(block: nn.Module, attends: torch.Tensor):
    """Whatever the block's attention is, within this block nobody looks at the tokens that do not attend."""
    bias = torch.zeros(attends.shape).masked_fill(~attends, float("-inf"))
    plain, softmax, method, mixed = F.scaled_dot_product_attention, F.softmax, torch.Tensor.softmax, []

    def of_keys(like):
        """For (B, H, ·, N), or with images and heads in one dimension."""
        return bias[:, None, None] if like.ndim == 4 else bias.repeat_interleave(len(like) // len(bias), 0)[:, None]

    def masked(*parts, attn_mask=None, **options):
        mask = of_keys(parts[0]) + (0 if attn_mask is None else attn_mask)
        shape = (*mask.shape[:-2], parts[0].shape[-2], mask.shape[-1])
        return plain(*parts, attn_mask=mask.expand(shape), **options)

    # Of attentions that are not fused.
    F.softmax = lambda logits, *options, **named: softmax(logits + of_keys(logits), *options, **named)
    torch.Tensor.softmax = lambda logits, *options, **named: method(logits + of_keys(logits), *options, **named)
    F.scaled_dot_product_attention = masked
    if isinstance(getattr(block, "attn", None), TalkingHeadAttn):  # (B, N, N, H), mixed before and behind the softmax
        before = lambda *_: _[-1] + bias[:, None, :, None]  # noqa: E731
        behind = lambda *_: _[-1] * attends[:, None, :, None]  # noqa: E731
        mixed = [
            block.attn.proj_l.register_forward_hook(before),
            block.attn.proj_w.register_forward_hook(behind),
        ]
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.softmax, torch.Tensor.softmax = plain, softmax, method
        for handle in mixed:
            handle.remove()
