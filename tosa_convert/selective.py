"""What makes a host's own block token-selective, without copying its forward.

The scorer of a selective layer reads what it needs: the queries and keys of the layer before, through
hooks on its projections, or the tokens as they arrive. The layer itself becomes a generated subclass of
its own class: it chooses the tokens, takes them out, runs the host's forward on them, and its bypass
says what the others get. All tokens leave the layer, in order. Layers behind which tokens are gone are in
:mod:`tosa_convert.lasting`.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from tosa_convert.bypasses import WHOLE
from tosa_convert.errors import TosaError
from tosa_convert.matching import features_of, match
from tosa_convert.passage import Passage
from tosa_convert.tokens import RATIO_STEPS, Choice, choose_best, keep_count, put, ratio_steps


class Matcher(nn.Module):
    """Finds a partner for each skipped token of a choice that has none. A module, so that its work can be counted."""

    def __init__(self, prefix: int):
        super().__init__()
        self.prefix = prefix

    @torch.no_grad()
    def forward(self, features: torch.Tensor, choice: Choice) -> Choice:
        return match(features, self.prefix, choice)


@dataclass
class Selection:
    """How one selective layer chooses its tokens, and what it chose last.

    Attributes:
        previous: the selection of the layer that the scorer listens to, if that one skips tokens itself;
            their scores are then those they had there.
    """

    layer: int
    ratio: float
    prefix: int
    bypass: str
    passage: Passage
    per_head: bool = False
    previous: "Selection | None" = None
    active: bool = True
    reading: torch.Tensor | None = None  # what the scorer has read, until the layer runs
    normed: torch.Tensor | None = None  # see with_normed
    scores: torch.Tensor | None = None  # (B, N), for the layers that listen to this one
    choice: Choice | None = None  # attended: (B, prefix + K), or (B·H, prefix + K) with per_head

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
        """Let the selector read queries and keys, (B, H, N, D); no more of them is kept than it needs."""
        if self.selects:
            with torch.no_grad():  # a hard choice has no gradient; the selector learns by distillation
                self.reading = selector.read(queries, keys)

    def choose(self, selector: nn.Module, patches: int, features: torch.Tensor | None) -> Choice:
        """Who attends.

        Args:
            selector: a scorer.
            patches: how many patch tokens the keep ratio is of.
            features: what a scorer that does not listen sees, see :func:`~tosa_convert.matching.features_of`.

        Without a new forward of the layer listened to (gradient checkpointing runs a block again for
        its backward), the choice of the last forward stands: there each forward needs its backward
        before the next.
        """
        reading, self.reading = self.reading if selector.listens else features, None
        if reading is not None:
            with torch.no_grad():
                if selector.chooses:
                    self.choice = selector(reading, self.steps)
                else:
                    self.choice = self._best(selector(reading), patches)
        if self.choice is None:
            raise TosaError(
                f"layer {self.layer} is selective but the layer it listens to has not run before it; "
                "run the model from its first layer on"
            )
        return self.choice

    def _best(self, scores: torch.Tensor, patches: int) -> Choice:
        scores = scores.flatten(0, 1) if self.per_head else scores.mean(1)
        if self.previous is not None and self.previous.selects:
            before = self.previous
            scores = put(before.scores, before.choice.attended, scores)
        self.scores = scores
        return choose_best(scores, self.prefix, self.keep(patches))

    @contextmanager
    def with_normed(self, normed: torch.Tensor | None) -> Iterator[None]:
        """Within this block the norm in front of the layer's attention gives ``normed``, if that is not None."""
        self.normed = normed
        try:
            yield
        finally:
            self.normed = None

    def replace_normed(self, norm: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor | None:
        """A forward hook on that norm."""
        return self.normed

    def forget(self) -> None:
        """Let go of what the last forward pass left."""
        self.reading = self.scores = self.choice = None
        self.passage.forget()


@functools.cache
def selective_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a host's block that runs ``base.forward`` on the chosen tokens only.

    Its ``listen`` is to receive the queries and keys that its scorer listens to. The base is held here
    rather than found through the instance's class, which wrappers such as FSDP replace.
    """

    def forward(self, tokens, *args, **kwargs):
        selection, host = self.selection, self.selection_host
        if not selection.active:
            return base.forward(self, tokens, *args, **kwargs)
        host.check_arguments(selection.layer, args, kwargs)
        if not selection.selects:
            return base.forward(self, tokens, *args, **kwargs)
        normed = features = None
        if self.matcher is not None or not self.selector.listens:
            normed = host.normed(self, tokens)
            features = features_of(tokens.detach(), normed.detach())
        choice = selection.choose(self.selector, tokens.shape[1] - selection.prefix, features)
        if selection.per_head:  # the attention inside reads the choice itself
            return base.forward(self, tokens, *args, **kwargs)
        if self.matcher is not None:
            choice = selection.choice = self.matcher(features, choice)

        def run(some, sizes=None, normed=None):
            with selection.with_normed(normed):
                return host.call(self, base.forward, some, args, kwargs, choice.attended, sizes)

        return WHOLE[selection.bypass](run, tokens, normed, choice)

    return grafted_class("Selective", base, forward=forward, listen=listen)


def listen(self, queries: torch.Tensor, keys: torch.Tensor) -> None:
    """A block's method: let its scorer read queries and keys, (B, H, N, D)."""
    self.selection.listen(self.selector, queries, keys)


def grafted_class(kind: str, base: type[nn.Module], **members) -> type[nn.Module]:
    """A subclass for instances of ``base`` to be turned into, and back again."""
    members = {**members, "grafted_on": base, "__module__": base.__module__}
    return type(f"{kind}{base.__name__}", (base,), members)


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
    """Which tokens attended in the last forward pass: layer → positions, prefix tokens first. Under a lasting
    bypass: which of the tokens that entered the layer were left behind it, none where all were."""
    return {
        block.selection.layer: block.selection.choice.attended
        for block in selective_blocks(model)
        if block.selection.choice is not None
    }
