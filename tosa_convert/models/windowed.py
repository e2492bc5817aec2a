"""ViTs whose blocks attend within windows, but for a few that attend over the whole image (ViTDet, arXiv 2203.16527;
SAM, arXiv 2304.02643): these few, which hold most of the cost at large sizes, are the layers that can be selective."""

import functools

from torch import nn

from tosa_convert.base.errors import UnsupportedModelError, UsageError
from tosa_convert.base.thread_local import PerThread
from tosa_convert.models.decomposed_bias import decomposed_bias
from tosa_convert.models.hooks import ProjectionTap
from tosa_convert.models.masks import total, weight_of
from tosa_convert.models.proof.calls import first_of
from tosa_convert.models.subclassing import answered


def over_the_image(model: nn.Module, blocks: list[nn.Module]) -> list[nn.Module]:
    """Those of the blocks that attend over the whole image.

    Raises:
        UnsupportedModelError: there are none.
    """
    found = [block for block in blocks if block.window_size == 0 and not getattr(block, "use_residual_block", False)]
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be made token-selective: the attention of all its blocks runs within "
            "windows, and a token cannot leave one without changing the others"
        )
    return found


class Windowed:
    """What such models have in common; goes before the adapter of a library.

    Layers are counted among the blocks that attend over the whole image.
    """

    relative = True
    own_heads = False
    windows = True
    gives_maps = True
    channels_first = False
    """Whether blocks take (B, C, rows, columns) rather than (B, rows, columns, C)."""

    @functools.cached_property
    def running(self) -> PerThread:
        """The grid of the image whose tokens were taken last, and the places of those that a block runs on."""
        return PerThread()

    def taken(self, entering):
        if entering.ndim == 3:
            return entering
        maps = entering.permute(0, 2, 3, 1) if self.channels_first else entering
        self.running.set((tuple(maps.shape[1:3]), None))
        return maps.flatten(1, 2)

    def restored(self, tokens, entering):
        sides = entering.shape[-2:] if self.channels_first else entering.shape[1:3]
        maps = tokens.unflatten(1, tuple(sides))
        return maps.permute(0, 3, 1, 2) if self.channels_first else maps

    def as_normed(self, normed):
        return normed[:, :, None]

    def steered(self, block):
        return [(self.attention(block), "forward")]

    def call(self, block, forward, tokens, args, kwargs, places=None, sizes=None):
        """As a map of one column."""
        attention, (grid, _) = self.attention(block), self.running.get()
        self.running.set((grid, places))
        column = tokens.mT[..., None] if self.channels_first else tokens[:, :, None]
        with answered(attention, functools.partial(self.by_parts, attention, sizes)):
            left = first_of(forward(block, column, *args, **kwargs))
        return left[..., 0].mT if self.channels_first else left[:, :, 0]

    def by_parts(self, attention, sizes, *args, **kwargs):
        column = args[0] if args else kwargs["hidden_states"]
        tokens = column[:, :, 0]
        queries, keys, values = self.project(attention, tokens, {})
        bias = weight_of(sizes)
        if hasattr(attention, "rel_pos_h"):
            grid, places = self.running.get()
            found = decomposed_bias(queries, attention.rel_pos_h, attention.rel_pos_w, places, grid)
            bias = total(found, bias)
        joined, weights = self.attend(attention, queries, keys, values, bias)
        return self.finish(attention, joined.transpose(1, 2).flatten(2)[:, :, None], column, weights)

    def any_size(self):
        """Not in a graph: windows are padded by numbers that depend on the size.

        Raises:
            UsageError: always.
        """
        raise UsageError("windows fix the size of the images in a graph")

    def tap(self, block, receive, detach=True):
        return _MapTap(self, block, receive, detach)


class _MapTap(ProjectionTap):
    """On one projection of all three, of tokens in a row or on their grid."""

    def sources(self):
        return [self.attention.qkv]

    def parted(self, projected):
        tokens = projected if projected.ndim == 3 else projected.flatten(1, 2)
        return self.adapter.split(self.attention, tokens)[:2]
