"""A model's own block made token-selective around its forward, which is not copied.

The score of a selective layer reads what it needs: the queries and keys of the layer before, through a tap on its
projections, or the tokens as they arrive. The layer itself becomes a generated subclass of its own class: it chooses
the tokens, and its bypass runs the block's own forward on them and says what the others get. All tokens leave the
layer, in order. Layers after which tokens are gone are in :mod:`tosa_convert.selective.reducing_block`.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn

from tosa_convert.base.errors import TosaError
from tosa_convert.methods.matching import apart, features_of
from tosa_convert.methods.packing import as_row
from tosa_convert.methods.score import Reads, View
from tosa_convert.methods.token_ops import Choice, pick, put, stand_ins
from tosa_convert.models.projections import class_logits
from tosa_convert.models.proof.positions import named as named_as
from tosa_convert.models.proof.positions import names_of
from tosa_convert.models.subclassing import Unheard, answered, grafted_class, ungrafted
from tosa_convert.selective.forward_state import Arrival
from tosa_convert.selective.packed import run_row
from tosa_convert.selective.per_head_attention import attend_per_head
from tosa_convert.selective.segment import form, hand_on, leave, take_up


@functools.cache
def selective_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a block that runs ``base.forward`` on the chosen tokens only.

    The base is held here rather than found through the instance's class, which wrappers such as FSDP replace.
    """
    names = names_of(ungrafted(base).forward)  # looked up once: torch.compile does not follow signatures

    def forward(self, *args, **kwargs):
        selection, adapter = self.selection, self.adapter
        if not selection.active:
            return base.forward(self, *args, **kwargs)
        entering, others, named = adapter.entering(args, kwargs)
        others, named = adapter.given(others, named)
        adapter.check_arguments(selection.layer, others, named)
        if not selection.selects:
            return base.forward(self, entering, *others, **named)
        try:
            return _selected(self, base, entering, others, named)
        finally:
            selection.current.end_again()

    def called_with(self, args: tuple, kwargs: dict) -> dict:
        """What it is called with after its tokens, by name."""
        return named_as(names, (None, *args), kwargs)

    members = {"forward": forward, "listen": listen, "called_with": called_with}
    return grafted_class("Selective", base, (selective_class, base), **members)


def _selected(block: nn.Module, base: type, entering, args: tuple, kwargs: dict):
    """A block's forward with a choice of its tokens."""
    selection, adapter = block.selection, block.adapter
    tokens, padding = adapter.taken(entering), adapter.padding(args, kwargs)
    if selection.per_head and padding is not None:
        raise TosaError(
            f"selective layer {selection.layer} chooses for each head, and was called with a mask of padding; "
            "convert with --selection shared"
        )
    # A mask may be one for all images.
    arrival = selection.arrive(entering, None if padding is None else padding.expand(tokens.shape[:2]))
    choose = functools.partial(_choose, block, tokens, arrival, args, kwargs)
    if selection.per_head:
        choice, _ = choose()
        attend = functools.partial(attend_per_head, adapter, adapter.attention(block), choice.attended)
        with answered(adapter.attention(block), attend):
            return base.forward(block, entering, *args, **kwargs)
    run = functools.partial(_run, block, base, args, kwargs)
    if selection.bypass.shares:
        after = _by_groups(block, run, choose, tokens, arrival)
    else:
        after = _by_layer(block, run, choose, tokens)
    return adapter.given_back(adapter.restored(_weighed(block, tokens, after), entering))


def _run(block: nn.Module, base: type, args: tuple, kwargs: dict, choice: Choice, tokens, sizes=None, normed=None):
    """A block's own forward on the tokens that attend, with ``normed`` in place of what its first norm gives."""
    adapter = block.adapter

    def call(tokens, args, kwargs, places, sizes, normed):
        norm = None if normed is None else adapter.norm(block)
        given = Unheard(lambda *_, **__: adapter.as_normed(normed))
        with nullcontext() if norm is None else answered(norm, given):
            return adapter.call(block, base.forward, tokens, args, kwargs, places, sizes)

    if choice.packed is None:
        return call(tokens, args, kwargs, choice.attended, sizes, normed)
    return run_row(block, call, tokens, args, kwargs, choice.packed, sizes, normed)


def _by_layer(block: nn.Module, run: Callable, choose: Callable, tokens: torch.Tensor) -> torch.Tensor:
    """(B, N, D) → (B, N, D), by the tokens that the layer chooses."""
    choice, normed = choose()
    together = (as_row(each, choice) for each in (tokens, normed))
    return block.selection.bypass.apply(functools.partial(run, choice), *together, choice).reshape(tokens.shape)


def _by_groups(
    block: nn.Module, run: Callable, choose: Callable, tokens: torch.Tensor, arrival: Arrival
) -> torch.Tensor:
    """(B, N, D) → (B, N, D), by way of the groups that the layer forms, or that it goes on with."""
    selection, normed = block.selection, None
    state, bypass, layer = selection.current.state, selection.bypass, selection.layer
    if selection.follows:
        segment = arrival.segment
        left = state.left.pop(layer - 1, None)
        course = take_up(bypass, tokens, segment, None if block._forward_pre_hooks else left)
        state.choices[layer] = segment.choice
        if selection.segment[0] in state.scores:
            state.scores[layer] = state.scores[selection.segment[0]]
    else:
        choice, normed = choose()
        segment, course, normed = form(bypass, *(as_row(each, choice) for each in (tokens, normed)), choice)
    course = course._replace(groups=run(segment.choice, course.groups, segment.sizes, normed))
    output = leave(segment, course).reshape(tokens.shape)
    if selection.goes_on:
        hand_on(state, layer, segment, None if block._forward_hooks else course, output)
    return output


def _weighed(block: nn.Module, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Tokens that leave a layer, (B, N, D), with what it added weighed by its gate: a token that attends by its own
    weight, one that is skipped by that of the token whose update it takes."""
    state, layer = block.selection.current.state, block.selection.layer
    weights = state.weights.pop(layer, None)
    if weights is None:
        return after
    choice = state.choices[layer]
    rows = choice.attended.shape[0]
    weights = weights.reshape(rows, weights.numel() // max(1, rows))  # also of an empty batch
    own = pick(weights, choice.attended)
    if choice.partners is None:  # the others stay as they are
        own = put(torch.ones_like(weights), choice.attended, own)
    else:
        own = pick(own, stand_ins(choice))
    return before + own.reshape(*before.shape[:2], 1).to(after.dtype) * (after - before)


def _choose(block: nn.Module, tokens: torch.Tensor, arrival: Arrival, args: tuple, kwargs: dict):
    """The choice of a block for its tokens, and these after its first norm if anyone asks for them."""
    selection, state = block.selection, block.selection.current.state
    padding = arrival.padding
    view = View(selection.steps, tokens.shape[1] - selection.prefix, arrival.grid)
    view = view._replace(padding=padding, partners=selection.bypass.partners)
    normed = None
    if selection.bypass.partners or selection.reads is not Reads.QUERIES_KEYS:
        normed = block.adapter.normed(block, tokens)
    if selection.reads is Reads.TOKENS:
        seen = (tokens, normed) if block.selector.gates else (tokens.detach(), normed.detach())
        view = view._replace(tokens=seen[0], normed=seen[1])
    if selection.reads is Reads.CLASS_QUERY:
        looks = functools.partial(class_logits, block.adapter, block, normed, block.called_with(args, kwargs))
        view = view._replace(class_logits=looks)
    choice = selection.choose(block.selector, state, arrival, view)
    if block.matcher is not None:
        features = state.features.pop(selection.layer, None)
        if features is None:
            features = apart(features_of(tokens.detach(), normed.detach()), padding)
        choice = block.matcher(features, choice)
    if padding is not None:
        choice = choice._replace(padding=as_row(padding, choice))
    state.choices[selection.layer] = choice
    return choice, normed


def listen(self, queries: torch.Tensor, keys: torch.Tensor) -> None:
    """A block's method: let its score read queries and keys, (B, H, N, D)."""
    self.selection.listen(self.selector, queries, keys)
