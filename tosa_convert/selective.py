"""What makes a host's own block token-selective, without copying its forward.

Layer l − 1 is tapped: hooks on its query and key projections let the scorer of layer l read what
they compute. Layer l becomes a generated subclass of its own class: it scores the tokens from that
reading, takes the best ones out, runs the host's forward on them, and puts them back. The tokens
that were not chosen leave the layer as they came.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from tosa_convert.errors import TosaError
from tosa_convert.tokens import RATIO_STEPS, gather_tokens, keep_count, ratio_steps, rejoin_tokens, top_tokens


@dataclass
class Selection:
    """How one selective layer chooses its tokens, and what it chose last."""

    layer: int
    ratio: float
    prefix: int
    per_head: bool
    active: bool = True
    reading: torch.Tensor | None = None  # what the scorer has read, until the layer runs
    chosen: torch.Tensor | None = None  # (B, prefix + K), or (B·H, prefix + K) with per_head

    @property
    def steps(self) -> int:
        return ratio_steps(self.ratio)

    @property
    def selects(self) -> bool:
        """Whether there is anything to choose."""
        return self.active and (self.per_head or self.steps < RATIO_STEPS)

    def keep(self, patches: int) -> int:
        """How many of so many patch tokens attend."""
        return keep_count(patches, self.steps)

    def listen(self, selector: nn.Module, queries: torch.Tensor, keys: torch.Tensor) -> None:
        """Let the selector read the queries and keys, (B, H, N, D), of the layer before; no more of them is kept
        than it needs."""
        if self.selects:
            with torch.no_grad():  # a hard choice has no gradient; the selector learns by distillation
                self.reading = selector.read(queries, keys)

    def choose(self, selector: nn.Module) -> torch.Tensor:
        """The positions that attend, by what was read in the layer before.

        Without a new forward of the layer before (gradient checkpointing runs a block again for
        its backward), the choice of the last forward stands: there each forward needs its backward
        before the next.
        """
        if self.reading is not None:
            reading, self.reading = self.reading, None
            with torch.no_grad():
                scores = selector(reading)
            scores = scores.flatten(0, 1) if self.per_head else scores.sum(1)
            self.chosen = top_tokens(scores, self.prefix, self.steps)
        if self.chosen is None:
            raise TosaError(
                f"layer {self.layer} is selective but layer {self.layer - 1} has not run before it; "
                "run the model from its first layer on"
            )
        return self.chosen


@functools.cache
def selective_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a host's block that runs ``base.forward`` on the chosen tokens only. Its ``listen`` is to
    receive the queries and keys of the block before.

    The base is held here rather than found through the instance's class, which wrappers such as
    FSDP replace.
    """

    def forward(self, tokens, *args, **kwargs):
        selection = self.selection
        if not selection.active:
            return base.forward(self, tokens, *args, **kwargs)
        _refuse_per_token_arguments(selection.layer, args, kwargs)
        if not selection.selects:
            return base.forward(self, tokens, *args, **kwargs)
        chosen = selection.choose(self.selector)
        if selection.per_head:  # the attention inside reads the choice itself
            return base.forward(self, tokens, *args, **kwargs)
        attended = base.forward(self, gather_tokens(tokens, chosen), *args, **kwargs)
        return rejoin_tokens(tokens, chosen, attended)

    def listen(self, queries, keys):
        self.selection.listen(self.selector, queries, keys)

    members = {"forward": forward, "listen": listen, "__module__": base.__module__}
    return type(f"Selective{base.__name__}", (base,), members)


def _refuse_per_token_arguments(layer: int, args: tuple, kwargs: dict) -> None:
    if any(isinstance(value, torch.Tensor) for value in (*args, *kwargs.values())):
        raise TosaError(
            f"selective layer {layer} was called with a mask or per-token positions, which are not gathered yet; "
            "run the model without an attention mask"
        )


@functools.cache
def per_head_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a host's attention in which each head attends over its own tokens.

    ToSA, Eq. 4: per head, the chosen tokens are replaced by their attention and the others pass
    that head's slice of the input through; the heads are concatenated, then projected.
    """

    def forward(self, *args, **kwargs):
        selection, host = self.selection, self.selection_host
        if not selection.active:
            return base.forward(self, *args, **kwargs)
        tokens = args[0] if args else kwargs["hidden_states"]
        queries, keys, values = host.project(self, tokens)
        batch, heads, count, width = queries.shape
        chosen = selection.chosen
        parts = (part.flatten(0, 1) for part in (queries, keys, values))
        picked = [gather_tokens(part, chosen).unflatten(0, (batch, heads)) for part in parts]
        dropout = host.attention_dropout(self) if self.training else 0.0
        attended = F.scaled_dot_product_attention(*picked, dropout_p=dropout)
        slices = tokens.reshape(batch, count, heads, width).transpose(1, 2).flatten(0, 1)
        joined = rejoin_tokens(slices, chosen, attended.flatten(0, 1)).unflatten(0, (batch, heads))
        return host.finish(self, joined.transpose(1, 2).reshape(batch, count, heads * width), tokens)

    return type(f"PerHead{base.__name__}", (base,), {"forward": forward, "__module__": base.__module__})


def selective_blocks(model: nn.Module) -> list[nn.Module]:
    """The selective blocks of a converted model, in order of their layers; empty for an ordinary model."""
    found = [module for module in model.modules() if isinstance(getattr(module, "selection", None), Selection)]
    blocks = [module for module in found if isinstance(getattr(module, "selector", None), nn.Module)]
    return sorted(blocks, key=lambda block: block.selection.layer)


@contextmanager
def all_tokens(model: nn.Module) -> Iterator[None]:
    """Within this block the model runs every layer on every token, as before its conversion; nothing is read."""
    selections = [block.selection for block in selective_blocks(model)]
    before = [selection.active for selection in selections]
    for selection in selections:
        selection.active = False
    try:
        yield
    finally:
        for selection, active in zip(selections, before, strict=True):
            selection.active = active


def chosen_tokens(model: nn.Module) -> dict[int, torch.Tensor]:
    """Which tokens attended in the last forward pass: layer → positions, prefix tokens first."""
    return {
        block.selection.layer: block.selection.chosen
        for block in selective_blocks(model)
        if block.selection.chosen is not None
    }
