"""Rotary positions (RoFormer, arXiv 2104.09864): attention that turns queries and keys by their tokens' places."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from tosa_convert.methods.token_ops import flat_positions
from tosa_convert.models.hooks import PairTap


def positions_at(positions: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Rotary positions (N, D), (H, N, D) or, image by image, (B, H or 1, N, D) of all patches, and places among them
    (B, K) → (B, H or 1, K, D)."""
    batch, count = places.shape
    if positions.ndim < 4:
        heads = positions if positions.ndim == 3 else positions[None]
        return heads.index_select(1, places.reshape(-1)).unflatten(1, (batch, count)).transpose(0, 1)
    of_each = positions.transpose(1, 2)  # (B, N, H or 1, D)
    rows = of_each.flatten(0, 1).index_select(0, flat_positions(of_each.shape[1], places)[0])
    return rows.unflatten(0, (batch, count)).transpose(1, 2)


def turn_halves(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """(B, H, N, D) turned, channel i with channel i + D / 2 as a pair."""
    first, second = heads.chunk(2, dim=-1)
    cosines, sines = (
        each if each.shape[-1] == heads.shape[-1] else torch.cat([each, each], -1) for each in (cosines, sines)
    )
    return heads * cosines + torch.cat([-second, first], dim=-1) * sines


def turn_pairs(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """(B, H, N, D) turned, channel 2 i with channel 2 i + 1 as a pair."""
    crossed = torch.stack([-heads[..., 1::2], heads[..., ::2]], dim=-1).flatten(-2)
    cosines, sines = (
        each if each.shape[-1] == heads.shape[-1] else each.repeat_interleave(2, -1) for each in (cosines, sines)
    )
    return heads * cosines + crossed * sines


class RotaryTap(PairTap, ABC):
    """A third hook, on the call of the attention, which is the third source, notes the positions that it brings."""

    def stand_on(self, source, index):
        if index < 2:
            super().stand_on(source, index)
        else:
            source.register_forward_pre_hook(self.note_positions, with_kwargs=True)

    def note_positions(self, attention: nn.Module, args: tuple, kwargs: dict) -> None:
        self.pending.set({"positions": self.positions_in(args, kwargs)})

    def formed(self, queries, keys):
        return self.turned(queries, keys, self.pending.take()["positions"])

    @abstractmethod
    def positions_in(self, args: tuple, kwargs: dict) -> Any:
        """The positions among the arguments of the attention's call, None where there are none."""

    def turned(self, queries: torch.Tensor, keys: torch.Tensor, positions: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What was taken → queries and keys (B, H, N, D), turned; where :meth:`formed` does not do it itself."""
        raise NotImplementedError
