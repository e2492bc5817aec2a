"""Layers after which tokens are gone: as MCTF has them, before the block; as ToMe and EViT have them, between its
attention and its MLP. The layers after run on the rest.

The halves of a block are run by its own forward, twice: once with its MLP silent, once with its attention. A silent
half is answered with zeros, so that its branch adds nothing.
"""

import functools
import inspect
from collections.abc import Callable

import torch
from torch import nn

from tosa_convert.base.errors import TosaError, UnsupportedModelError, UsageError
from tosa_convert.methods.bypass import Groups
from tosa_convert.methods.score import Acts, Reads, View
from tosa_convert.methods.token_ops import RATIO_STEPS, Choice, gather_tokens
from tosa_convert.models.adapter import Adapter, run
from tosa_convert.models.branches import silenced
from tosa_convert.models.proof.calls import call_of, repeat
from tosa_convert.models.relative_bias import RelativeAdapter
from tosa_convert.models.subclassing import check_own, grafted_class
from tosa_convert.selective.block import listen
from tosa_convert.selective.forward_state import Arrival, CurrentForward
from tosa_convert.selective.look_ahead import Run, look_ahead, run_fused
from tosa_convert.selective.selection import selective_blocks

MAKERS = ("forward_intermediates", "get_intermediate_layers")
"""timm's methods that make maps of tokens."""
PRUNER = "prune_intermediate_layers"


class MapGuard:
    """Stands in for one of these methods: every token is put back where it makes maps of them."""

    def __init__(self, method: Callable, current: CurrentForward, puts_back: bool):
        self.method, self.current, self.puts_back = method, current, puts_back

    def __call__(self, *args, **kwargs):
        asked = inspect.signature(self.method).bind(*args, **kwargs)
        asked.apply_defaults()
        if not (asked.arguments.get("output_fmt") == "NCHW" or asked.arguments.get("reshape")):
            return self.method(*args, **kwargs)
        if not self.puts_back:
            raise UsageError(
                "this conversion removes patch tokens, so there are no maps of them; ask for output_fmt='NLC' or "
                "reshape=False, or convert with another bypass"
            )
        with self.current.putting_back():
            return self.method(*args, **kwargs)


class PruneGuard:
    """Stands in for timm's ``prune_intermediate_layers``: the layer that is the last one then puts tokens back."""

    def __init__(self, method: Callable):
        self.method = method

    def __call__(self, *args, **kwargs):
        found = self.method(*args, **kwargs)
        for block in selective_blocks(self.method.__self__)[-1:]:
            block.selection.last = True
        return found


@functools.cache
def reducing_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a block that takes tokens away before it, or between its attention and its MLP."""

    def forward(self, *args, **kwargs):
        selection, adapter = self.selection, self.adapter
        if not selection.active:
            return base.forward(self, *args, **kwargs)
        entering, args, kwargs = adapter.entering(args, kwargs)
        args, kwargs = adapter.given(args, kwargs)
        adapter.check_arguments(selection.layer, args, kwargs)
        if adapter.mask(args, kwargs) is not None:
            raise TosaError(
                f"layer {selection.layer} was called with a mask, which bypass {selection.bypass.name()} does not "
                "support; use identity, borrow or merge, or run the model without a mask"
            )
        try:
            return _reduced(self, base, entering, args, kwargs)
        finally:
            selection.current.end_again()

    def listen_for_partners(self, queries, keys):
        if self.selection.selects:
            self.selection.current.state.features[self.selection.layer] = keys.mean(1).detach()

    members = {"forward": forward, "listen": listen, "listen_for_partners": listen_for_partners}
    return grafted_class("Reducing", base, (reducing_class, base), **members)


def _reduced(block: nn.Module, base: type, entering, args: tuple, kwargs: dict):
    """A block's forward on the tokens that are left when it is reached."""
    selection, adapter = block.selection, block.adapter
    arrival = selection.arrive(entering)
    whole = arrival.puts_back
    state, bypass = selection.current.state, selection.bypass
    tokens, groups = _those_left(adapter, entering, arrival, whole)
    alone = groups if arrival.groups is None else None  # each token for itself

    def go(tokens, groups=None, sizes=None):
        if groups is None:  # nobody asks where they are
            return adapter.call(block, base.forward, tokens, args, kwargs)
        # What stands apart may stand for tokens that another one stands for too, so it has a place, not members.
        joins = isinstance(adapter, RelativeAdapter) and groups is not alone and not groups.apart
        joined = {"members": groups.places} if joins else {}
        return adapter.call(block, base.forward, tokens, args, kwargs, groups.at, sizes, **joined)

    if not selection.reduces or selection.steps_of(arrival.share) == RATIO_STEPS:
        tokens = go(tokens, groups, groups.sizes if bypass.proportional else None)
    else:
        reduce = _before if bypass.acts is Acts.BEFORE else _between
        tokens, groups = reduce(block, go, tokens, groups, arrival)
    state.groups[selection.layer] = groups
    if groups.places is not None and (whole or selection.last):
        tokens = adapter.restored(gather_tokens(tokens, groups.places), entering)
    return adapter.given_back(tokens)


def _those_left(adapter: Adapter, entering: torch.Tensor, arrival: Arrival, whole: bool):
    """The tokens that a layer has to do with, and their groups; each on its own as long as no layer took any away."""
    groups = arrival.groups
    tokens = adapter.taken(entering) if groups is None or whole else entering
    if groups is None:
        batch, count, _ = tokens.shape
        patches = count - adapter.prefix
        if isinstance(patches, int) and isinstance(arrival.patches, int) and patches > arrival.patches:
            raise TosaError(
                f"{patches} patches reach the layers, not {arrival.patches}: the model was changed after its "
                "conversion; convert it anew"
            )
        if isinstance(patches, int) and isinstance(arrival.patches, int) and patches < arrival.patches:
            raise TosaError(
                f"{patches} of {arrival.patches} patches reach the layers, which take away a share of all; turn "
                "patch dropout off (patch_drop_rate=0), or use bypass identity, borrow or merge"
            )
        places = torch.arange(count, device=tokens.device).expand(batch, count)
        return tokens, Groups(tokens.new_ones(batch, count), places, places, arrival.grid)
    return (gather_tokens(tokens, groups.at) if whole else tokens), groups


def _between(block: nn.Module, go: Run, tokens: torch.Tensor, groups: Groups, arrival: Arrival):
    """Tokens and groups after a block that takes some away between its attention and its MLP."""
    adapter, bypass = block.adapter, block.selection.bypass
    attention, mlp = adapter.branches(block)
    with silenced(mlp):
        tokens = go(tokens, groups, groups.sizes if bypass.proportional else None)
    choice, weights = _choose(block, tokens, groups, arrival)
    tokens, groups = bypass.reduce(tokens, choice, groups, weights)
    with silenced(attention):
        return go(tokens), groups


def _before(block: nn.Module, go: Run, tokens: torch.Tensor, groups: Groups, arrival: Arrival):
    """Tokens and groups after a block before which some are taken away."""
    adapter, bypass = block.adapter, block.selection.bypass
    ahead = look_ahead(adapter, block, go, tokens, groups, groups.sizes if bypass.proportional else None)
    choice, weights = _choose(block, tokens, groups, arrival, ahead.received)
    fewer, after = bypass.reduce(tokens, choice, groups, weights)
    if bypass.looks_ahead:
        shares = bypass.pooling(choice, groups)
        return run_fused(adapter, block, go, ahead, choice, shares, fewer), after
    fewer = go(fewer, after, after.sizes if bypass.proportional else None)
    state = block.selection.current.state
    for noted in (state.readings, state.features):  # of the second run, which nobody takes
        noted.pop(block.selection.layer, None)
    return fewer, after


def _choose(block: nn.Module, tokens: torch.Tensor, groups: Groups, arrival: Arrival, received=None):
    """Who is left, with partners if they are needed, and the scores if there are any."""
    selection, layer = block.selection, block.selection.layer
    state = selection.current.state
    sizes = groups.sizes if selection.bypass.proportional else None
    view = View(selection.steps_of(arrival.share), arrival.patches, arrival.grid, sizes=sizes, received=received)
    if selection.reads is not Reads.QUERIES_KEYS:
        normed = block.adapter.normed(block, tokens).detach() if selection.reads is Reads.TOKENS else None
        view = view._replace(tokens=tokens.detach(), normed=normed)
    if groups.apart:
        last = torch.arange(tokens.shape[1], device=tokens.device) >= tokens.shape[1] - groups.apart
        arrival = arrival._replace(padding=last.expand(tokens.shape[:2]))
    choice: Choice = selection.choose(block.selector, state, arrival, view)
    if block.matcher is not None:
        choice = block.matcher(state.features.pop(layer), choice)
        state.choices[layer] = choice
    return choice, state.scores.get(layer)


def check_halves(adapter: Adapter, block: nn.Module) -> None:
    """A block with both halves silent must leave its tokens as they are.

    Raises:
        UnsupportedModelError: it does not, so its halves cannot be run apart.
        UsageError: see :func:`tosa_convert.models.subclassing.check_own`.
    """
    weight, preprocessing = next(block.parameters()), adapter.preprocessing()
    image = weight.new_zeros(1, preprocessing.channels, *preprocessing.size)
    call = call_of(block, lambda: run(adapter.model, image))
    tokens, silent = call.tokens, [pair for branch in adapter.branches(block) for pair in branch]
    for module, _ in silent:
        check_own(module)
    try:
        for module, answer in silent:
            module.forward = answer
        after = repeat(block, call, tokens)
    finally:
        for module, _ in silent:
            del module.forward
    if not torch.equal(after, tokens):
        raise UnsupportedModelError(
            f"{type(block).__name__} has something after its attention that adds to the tokens by itself, so no "
            "tokens can be taken away inside it; use bypass identity, borrow or merge"
        )
