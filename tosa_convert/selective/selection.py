"""How one selective layer chooses its tokens."""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tosa_convert.base.errors import TosaError
from tosa_convert.base.seeding import as_seed
from tosa_convert.methods.bypass import Bypass
from tosa_convert.methods.packing import by_image, choose_above, match_in_row
from tosa_convert.methods.score import Reads, Score, View
from tosa_convert.methods.token_ops import (
    RATIO_STEPS,
    Choice,
    choose_best,
    keep_count,
    put,
    ratio_steps,
    without_padding,
)
from tosa_convert.selective.forward_state import (
    Arrival,
    CurrentForward,
    ForwardState,
    Left,
    may_run_again,
)


class Matcher(nn.Module):
    """Finds a partner for each skipped token of a choice that has none. A module, so that its work can be counted."""

    def __init__(self, prefix: int):
        super().__init__()
        self.prefix = prefix

    @torch.no_grad()
    def forward(self, features: torch.Tensor, choice: Choice) -> Choice:
        return match_in_row(features, self.prefix, choice)


@dataclass
class Selection:
    """What is fixed about the choice of one selective layer; what changes is in the forward's state.

    Attributes:
        layer: from 1.
        ratio: share of the patch tokens that attend, or that are left after the layer; with a threshold the most.
        prefix: tokens in front of the patches.
        bypass: what the other tokens get.
        reads: what the score looks at.
        reads_before: whether in the layer before.
        previous: the selection of the layer that is read, if that one skips tokens itself; their scores are then
            those they had there.
        reduces: whether tokens are gone after this layer; False as well where a layer only lives with what is left.
        last: whether it is the model's last layer.
        segment: the layers in a row that share one choice, this one among them.
        threshold: the score from which on a token attends; None where it is a number of tokens that do.
        chance: a seed, by which other tokens are chosen, as many; None but for a control of thresholds or gates.
        attends_elsewhere: whether its attention was found not to be torch's own, see
            :mod:`tosa_convert.selective.packed`.
    """

    layer: int
    ratio: float
    prefix: int
    bypass: Bypass
    current: CurrentForward
    reads: Reads
    reads_before: bool
    previous: "Selection | None" = None
    reduces: bool = True
    last: bool = False
    segment: tuple[int, ...] = ()
    threshold: float | None = None
    chance: int | None = None
    active: bool = True
    attends_elsewhere: bool = False

    @property
    def steps(self) -> int:
        return ratio_steps(self.ratio)

    def steps_of(self, share: float | None) -> int:
        """:attr:`steps` where only a share of the tokens is taken away that it is to take; rounded down, as ratios are
        that mean a number of tokens, since a layer keeps the next whole number above."""
        if share is None:
            return self.steps
        return max(1, math.floor((1 - (1 - self.ratio) * share) * RATIO_STEPS + 1e-6))

    @property
    def per_head(self) -> bool:
        return self.bypass.per_head

    @property
    def selects(self) -> bool:
        """Whether there is anything to choose."""
        if not (self.active and self.reduces):
            return False
        return self.per_head or self.threshold is not None or self.steps < RATIO_STEPS

    @property
    def follows(self) -> bool:
        """Whether the choice is that of the layer before."""
        return self.layer in self.segment[1:]

    @property
    def goes_on(self) -> bool:
        """Whether the next layer has the same choice."""
        return self.layer in self.segment[:-1]

    def keep(self, patches: int) -> int:
        """How many of so many patch tokens attend."""
        return keep_count(patches, self.steps)

    def listen(self, score: Score, queries: torch.Tensor, keys: torch.Tensor) -> None:
        """Let the score read queries and keys, (B, H, N, D); no more of them is kept than it needs."""
        if self.selects and not self.follows:
            with torch.no_grad():  # a hard choice has no gradient; a score learns by distillation
                state = self.current.last
                if state is None:  # a layer before this one is run once more, whose readings were taken
                    return
                read = score if state.row is None else functools.partial(state.row.hear, self.layer, score)
                state.readings[self.layer] = read(queries, keys)

    def arrive(self, tokens: torch.Tensor, padding: torch.Tensor | None = None) -> Arrival:
        """What the layers before hand on to this one, with the tokens that enter it; the same when the layer is run
        once more on these tokens.

        Args:
            padding: (B, N), which tokens are none.
        """
        kept = may_run_again()
        known = self.current.recollection.find(self.layer, tokens) if kept else None
        if known is not None:
            self.current.begin_again(known)
            return known
        state = self.current.state
        before = self.previous if self.previous is not None and self.previous.selects else None
        arrival = Arrival(
            grid=state.grid,
            reading=state.readings.pop(self.layer, None) if self.reads_before else None,
            groups=state.groups.get(self.layer - 1),
            scores=None if before is None else state.scores[before.layer],
            attended=None if before is None else state.choices[before.layer].attended,
            segment=self._left(state).segment if self.follows else None,
            padding=padding,
            share=state.share,
            # Later ones are there too, where gradient checkpointing runs several layers once more.
            before=state.gates.get(max((layer for layer in state.gates if layer < self.layer), default=0)),
            puts_back=self.current.puts_back,
        )
        if kept:
            self.current.recollection.keep(self.layer, tokens, arrival)
        return arrival

    def _left(self, state: ForwardState) -> Left:
        """What the layer before left.

        Raises:
            TosaError: it has not run in this forward pass.
        """
        if self.layer - 1 not in state.left:
            raise TosaError(
                f"layer {self.layer} goes on with the tokens that layer {self.segment[0]} chose, and layer "
                f"{self.layer - 1} has not run in this forward pass; run the model from its images on"
            )
        return state.left[self.layer - 1]

    def choose(self, score: Score, state: ForwardState, arrival: Arrival, view: View) -> Choice:
        """Who attends; noted in the state.

        Raises:
            TosaError: the layer that the score reads has not run in this forward pass.
        """
        if self.reads is Reads.QUERIES_KEYS:
            reading = arrival.reading if self.reads_before else state.readings.pop(self.layer, None)
            if reading is None:
                where = "the layer before it" if self.reads_before else "its attention"
                raise TosaError(
                    f"layer {self.layer} is selective, but its score read nothing from {where} in this forward pass; "
                    "run the model from its images on, and convert it again if that layer was replaced"
                )
            view = view._replace(reading=reading)
        kept = keep_count(view.patches, view.steps)
        view = view._replace(before=arrival.before, threshold=self.threshold or 0.0)
        with torch.set_grad_enabled(score.gates and torch.is_grad_enabled()):
            if self.threshold is not None or score.gates:
                worth = self._by_chance(self._worth(score, view, state, arrival), state, arrival.padding)
                if self.threshold is None:
                    found = choose_best(worth, self.prefix, kept)
                else:
                    most = kept if view.steps < RATIO_STEPS else None
                    found = choose_above(worth, self.prefix, self.threshold_for(worth), most)
            else:
                found = score(view)
                if not score.chooses:
                    found = choose_best(self._settled(found, state, arrival), self.prefix, kept)
        state.choices[self.layer] = found
        return found

    def threshold_for(self, worth: torch.Tensor) -> Any:
        """The threshold for these values, (B, N)."""
        return self.threshold

    def _worth(self, score: Score, view: View, state: ForwardState, arrival: Arrival) -> torch.Tensor:
        """(B, N), by which the threshold goes."""
        view = view._replace(any_number=True)
        if not isinstance(view.reading, list):
            worth = score(view)
            if worth.features is not None:
                state.features[self.layer] = worth.features
            if worth.logits is not None:
                state.gates[self.layer], state.weights[self.layer] = worth.logits, worth.weights
            return self._settled(worth.values, state, arrival).detach()
        # Image by image, of those that attended in the layer that is read.
        each = [score(view._replace(reading=reading)).values for reading in view.reading]
        values = torch.cat([values.mean(1) if values.ndim == 3 else values for values in each], dim=1)
        return self._settled(values, state, arrival)

    def _by_chance(self, worth: torch.Tensor, state: ForwardState, padding: torch.Tensor | None) -> torch.Tensor:
        """(B, N); of a control with the values of the patches in another order, the same one in every image but for
        its padding, which stays where it is, and what weighs them with them."""
        if self.chance is None:
            return worth
        generator = torch.Generator().manual_seed(as_seed(1009 * self.chance + self.layer))
        drawn = torch.randperm(worth.shape[1] - self.prefix, generator=generator).to(worth.device)
        absent = torch.zeros_like(worth, dtype=torch.bool) if padding is None else padding
        absent = absent[:, self.prefix :]
        # Patches in the order that was drawn, and their places in the image; what pads it is behind both.
        source = drawn[absent[:, drawn].long().argsort(stable=True, dim=1)]
        order = torch.empty_like(source).scatter(1, absent.long().argsort(stable=True, dim=1), source) + self.prefix
        order = torch.cat([torch.arange(self.prefix, device=order.device).expand(len(order), -1), order], dim=1)
        if self.layer in state.weights:
            state.weights[self.layer] = state.weights[self.layer].gather(1, order)
        return worth.gather(1, order)

    def _settled(self, scores: torch.Tensor, state: ForwardState, arrival: Arrival) -> torch.Tensor:
        """Scores of the tokens that were read, (B, H, N) or (B, N) → of all tokens, (B, N), noted in the state."""
        if scores.ndim == 3:
            scores = scores.flatten(0, 1) if self.per_head else scores.mean(1)
        if arrival.scores is not None:
            scores = put(arrival.scores, arrival.attended, scores)
        scores = without_padding(scores, arrival.padding)
        state.scores[self.layer] = scores
        return scores


def selective_blocks(model: nn.Module) -> list[Any]:
    """The selective blocks of a converted model, in order of their layers; empty for an ordinary model."""
    found = [module for module in model.modules() if isinstance(getattr(module, "selection", None), Selection)]
    return sorted(found, key=lambda block: block.selection.layer)


def choosing_blocks(model: nn.Module) -> list[Any]:
    """Those of them that choose, rather than going on with the tokens of the layer before."""
    return [block for block in selective_blocks(model) if not block.selection.follows]


def keeps_any_number(model: nn.Module) -> bool:
    """Whether a model keeps as many tokens as each image needs."""
    return any(block.selection.threshold is not None for block in selective_blocks(model))


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


def last_choices(model: nn.Module) -> dict[int, Choice]:
    """What was chosen in the last forward pass of this thread, by layer."""
    blocks = selective_blocks(model)
    state = blocks[0].selection.current.last if blocks else None
    return {} if state is None else {layer: state.choices[layer] for layer in sorted(state.choices)}


def chosen_tokens(model: nn.Module) -> dict[int, torch.Tensor | list[torch.Tensor]]:
    """Which tokens attended in the last forward pass of this thread: layer → positions, (B, prefix + K), or
    (B·H, prefix + K) where each head has its own; prefix tokens first. Where images keep different numbers of tokens:
    a list of (prefix + K,), one for each. With a bypass between attention and MLP: which
    of the tokens that entered the layer were left after it, none where all were."""
    return {
        layer: choice.attended if choice.packed is None else by_image(choice)
        for layer, choice in last_choices(model).items()
    }


def forget(model: nn.Module) -> None:
    """Let go of what the last forward pass of this thread left."""
    for block in selective_blocks(model):
        block.selection.current.forget()
