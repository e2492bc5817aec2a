"""timm: parallel-block and differential-attention ViTs.

Attention and MLP side by side (arXiv 2302.05442), several of each side by side (arXiv 2203.09795), and differential
attention (arXiv 2410.05258).
"""

import torch
from timm.layers import Attention, DiffAttention
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import nn

from tosa_convert.hosts import Host, PairTap, Receive, Tap
from tosa_convert.hosts.timm_vit import TimmVit, all_of, split_qkv


def find(model: nn.Module) -> Host | None:
    if not isinstance(model, VisionTransformer):
        return None
    return next((host(model) for host in (TimmFused, TimmThings, TimmDiff) if all_of(model.blocks, host.knows)), None)


class _Odd(TimmVit):
    own_heads = False

    @staticmethod
    def knows(block: nn.Module) -> bool:
        raise NotImplementedError


class TimmDiff(_Odd):
    """A head compares two pairs of queries and keys: twice as many maps as heads."""

    @staticmethod
    def knows(block):
        return isinstance(block, (Block, ResPostBlock)) and isinstance(block.attn, DiffAttention)

    @property
    def heads(self) -> int:
        return 2 * self.blocks[0].attn.num_heads

    def tap(self, block: nn.Module, receive: Receive, detach: bool = True) -> list:
        return PairTap(block.attn, receive, detach).hook(block.attn.q_norm, block.attn.k_norm)


class TimmFused(_Odd):
    """Attention and MLP are one module, side by side."""

    halves = False

    @staticmethod
    def knows(block):
        return isinstance(block, (ParallelScalingBlock, DiffParallelScalingBlock))

    def norm(self, block):
        return block.in_norm

    @property
    def heads(self) -> int:
        first = self.blocks[0]
        return first.num_heads * (2 if isinstance(first, DiffParallelScalingBlock) else 1)

    def tap(self, block: nn.Module, receive: Receive, detach: bool = True) -> list:
        return _FusedTap(block, receive, detach).hook(block.q_norm, block.k_norm)


class _FusedTap(PairTap):
    def formed(self, queries, keys):
        if isinstance(self.attention, DiffParallelScalingBlock):
            return queries, keys
        return queries.transpose(1, 2), keys.transpose(1, 2)


class TimmThings(_Odd):
    """Several attentions side by side, then several MLPs; all their heads are looked at."""

    halves = False

    @staticmethod
    def knows(block):
        return isinstance(block, ParallelThingsBlock) and all(isinstance(each.attn, Attention) for each in block.attns)

    def norm(self, block):
        return None  # each has its own

    @property
    def heads(self) -> int:
        return sum(each.attn.num_heads for each in self.blocks[0].attns)

    def tap(self, block: nn.Module, receive: Receive, detach: bool = True) -> list:
        tap = _ThingsTap(block, receive, detach)
        return [each.attn.qkv.register_forward_hook(tap) for each in block.attns]


class _ThingsTap(Tap):
    def __init__(self, block: nn.Module, receive: Receive, detach: bool = True):
        super().__init__(block, receive, detach)
        self.taken: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        attention = self.attention.attns[len(self.taken)].attn
        self.taken.append(split_qkv(attention, output.detach() if self.detach else output)[:2])
        if len(self.taken) == len(self.attention.attns):
            pairs, self.taken = self.taken, []  # nothing of a forward pass stays behind in memory
            self.receive(*(torch.cat(parts, dim=1) for parts in zip(*pairs, strict=True)))
