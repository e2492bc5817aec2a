"""timm: EVA-02, DINOv3, PE, ViTs with rotary positions."""

from contextlib import contextmanager

import torch
from timm.layers import AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import nn

from tosa_convert.models.adapter import Adapter
from tosa_convert.models.families.timm_vit import TimmVit, all_of
from tosa_convert.models.projections import QueryKey, split_heads
from tosa_convert.models.rotary import RotaryTap, positions_at
from tosa_convert.models.symbolic_sizes import OpenRanges, open_numbers

TIMM = ("eva",)


def find(model: nn.Module) -> Adapter | None:
    return TimmEva(model) if isinstance(model, Eva) and all_of(model.blocks, understood) else None


def understood(block: nn.Module) -> bool:
    return isinstance(block, (EvaBlock, EvaBlockPostNorm)) and isinstance(block.attn, (EvaAttention, AttentionRope))


class TimmEva(TimmVit):
    """The positions, ``rope``, come with each call of a block: (N, ·), or (heads, N, ·), of all patches of the grid."""

    relative = True

    def norm(self, block):
        return None if isinstance(block, EvaBlockPostNorm) else block.norm1

    def tap(self, block, receive, detach=True):
        return _NormTap(self, block, receive, detach)

    @contextmanager
    def exporting(self):
        """DINOv3's positions depend on the size of the grid."""
        with open_numbers(["timm.layers.pos_embed_sincos"]), OpenRanges():
            yield

    def check_arguments(self, layer, args, kwargs):
        super().check_arguments(layer, args, {name: value for name, value in kwargs.items() if name != "rope"})

    def arguments(self, args, kwargs, places, sizes):
        args, kwargs = super().arguments(args, kwargs, places, sizes)
        rope = kwargs.get("rope")
        if rope is None or places is None:
            return args, kwargs
        return args, {**kwargs, "rope": positions_at(rope, places[:, self.prefix :] - self.prefix)}

    def project(self, attention, tokens, arguments):
        if attention.qkv is not None:
            bias = getattr(attention, "q_bias", None)
            joined = attention.qkv(tokens)
            if bias is not None:
                joined = joined + torch.cat([bias, attention.k_bias, attention.v_bias])
            queries, keys, values = (split_heads(part, attention.num_heads) for part in joined.chunk(3, dim=-1))
        else:
            queries, keys, values = (
                split_heads(linear(tokens), heads)
                for linear, heads in (
                    (attention.q_proj, attention.num_heads),
                    (attention.k_proj, _key_heads(attention)),
                    (attention.v_proj, _key_heads(attention)),
                )
            )
        queries, keys = self.compared(attention, queries, keys, arguments)
        return queries, keys, _for_all_heads(attention, values)

    def query_and_key(self, attention):
        if attention.qkv is None:
            return QueryKey.of([attention.q_proj, attention.k_proj], False)
        elsewhere = getattr(attention, "q_bias", None) is not None
        return QueryKey.of([attention.qkv], False, (attention.q_bias, attention.k_bias) if elsewhere else None)

    def compared(self, attention, queries, keys, arguments):
        rope = arguments.get("rope")
        queries = _rotated(attention, attention.q_norm(queries), rope)
        return queries, _for_all_heads(attention, _rotated(attention, attention.k_norm(keys), rope))


def _key_heads(attention: nn.Module) -> int:
    return getattr(attention, "num_kv_heads", attention.num_heads)


def _for_all_heads(attention: nn.Module, keys: torch.Tensor) -> torch.Tensor:
    """Grouped-query attention has fewer heads of keys and values than of queries."""
    groups = attention.num_heads // _key_heads(attention)
    return keys if groups == 1 else keys.repeat_interleave(groups, dim=1)


def _rotated(attention: nn.Module, heads: torch.Tensor, rope: torch.Tensor | None) -> torch.Tensor:
    """(B, H, N, D) queries or keys, turned by their positions but for the prefix tokens, as the attention does it."""
    if rope is None:
        return heads
    prefix, half = attention.num_prefix_tokens, getattr(attention, "rotate_half", False)
    turned = apply_rot_embed_cat(heads[:, :, prefix:], rope, half=half)
    return torch.cat([heads[:, :, :prefix], turned], dim=2).type_as(heads)


class _NormTap(RotaryTap):
    """On what normalises queries and keys: the projections of some of these attentions are not called as modules."""

    def sources(self):
        return [self.attention.q_norm, self.attention.k_norm, self.attention]

    def positions_in(self, args, kwargs):
        return kwargs.get("rope", args[1] if len(args) > 1 else None)

    def turned(self, queries, keys, positions):
        queries, keys = (_rotated(self.attention, each, positions) for each in (queries, keys))
        return queries, _for_all_heads(self.attention, keys)
