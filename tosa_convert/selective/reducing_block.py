"""Layers after which tokens are gone, as ToMe and EViT have them: between attention and MLP some are dropped, fused
or merged, and the layers after run on the rest.

The halves of a block are run by its own forward, twice: once with its MLP silent, once with its attention. A silent
half is answered with zeros, so that its branch adds nothing.
"""

import functools
import inspect
from collections.abc import Callable

import torch
from torch import nn

from tosa_convert.base.errors import TosaError, UnsupportedModelError, UsageError
from tosa_convert.methods.score import Reads, View
from tosa_convert.methods.token_ops import gather_tokens
from tosa_convert.models.adapter import Adapter
from tosa_convert.models.subclassing import answered, grafted_class
from tosa_convert.selective.block import listen

MAKERS = ("forward_intermediates", "get_intermediate_layers")
"""timm's methods that make maps of tokens."""


class MapGuard:
    """Stands in for one of these methods: fewer tokens than patches would be reshaped into nonsense."""

    def __init__(self, method: Callable, bypass: str):
        self.method, self.bypass = method, bypass

    def __call__(self, *args, **kwargs):
        asked = inspect.signature(self.method).bind(*args, **kwargs)
        asked.apply_defaults()
        if asked.arguments.get("output_fmt") == "NCHW" or asked.arguments.get("reshape"):
            raise UsageError(
                f"after layers with bypass {self.bypass} there are fewer tokens than patches, so no maps; ask for "
                "output_fmt='NLC' or reshape=False, or convert with identity, borrow or merge"
            )
        return self.method(*args, **kwargs)


@functools.cache
def reducing_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a block that takes tokens away between its attention and its MLP."""

    def forward(self, *args, **kwargs):
        selection, adapter = self.selection, self.adapter
        if not selection.active:
            return base.forward(self, *args, **kwargs)
        tokens, args, kwargs = adapter.entering(args, kwargs)
        args, kwargs = adapter.given(args, kwargs)
        adapter.check_arguments(selection.layer, args, kwargs)
        if adapter.mask(args, kwargs) is not None:
            raise TosaError(
                f"layer {selection.layer} was called with a mask, which bypass {selection.bypass.name()} does not "
                "support; use identity, borrow or merge, or run the model without a mask"
            )
        state, bypass = selection.current.state, selection.bypass
        arrival = selection.arrive(state, tokens)
        groups = selection.entering(arrival, tokens) if bypass.puts_back else None
        sizes = groups.sizes if bypass.proportional else None
        if not selection.reduces:
            tokens = adapter.call(self, base.forward, tokens, args, kwargs, sizes=sizes)
        else:
            with answered(adapter.mlp(self), _zeros):
                tokens = adapter.call(self, base.forward, tokens, args, kwargs, sizes=sizes)
            view = View(selection.steps, state.patches, state.grid, sizes=sizes)
            if selection.reads is Reads.TOKENS:
                view = view._replace(tokens=tokens.detach(), normed=adapter.normed(self, tokens).detach())
            choice = selection.choose(self.selector, state, arrival, view)
            if self.matcher is not None:
                choice = self.matcher(state.features.pop(selection.layer), choice)
                state.choices[selection.layer] = choice
            tokens, groups = bypass.reduce(tokens, choice, groups, state.scores.get(selection.layer))
            with answered(adapter.attention(self), functools.partial(_attention_zeros, adapter)):
                tokens = adapter.call(self, base.forward, tokens, args, kwargs)
        state.groups[selection.layer] = groups
        whole = selection.last and bypass.puts_back
        return adapter.given_back(gather_tokens(tokens, groups.places) if whole else tokens)

    def listen_for_partners(self, queries, keys):
        if self.selection.selects:
            self.selection.current.state.features[self.selection.layer] = keys.mean(1).detach()

    members = {"forward": forward, "listen": listen, "listen_for_partners": listen_for_partners}
    return grafted_class("Reducing", base, (reducing_class, base), **members)


def _zeros(*args, **kwargs) -> torch.Tensor:
    """What a silent MLP gives."""
    tokens = args[0] if args else kwargs["hidden_states"]
    return torch.zeros_like(tokens[:, :1])


def _attention_zeros(adapter: Adapter, *args, **kwargs):
    return adapter.as_attention_output(_zeros(*args, **kwargs))


def check_halves(adapter: Adapter, block: nn.Module) -> None:
    """A block with both halves silent must leave its tokens as they are.

    Raises:
        UnsupportedModelError: it does not, so its halves cannot be run apart.
    """
    weight = next(block.parameters())
    tokens = torch.ones(1, 2, adapter.width, device=weight.device, dtype=weight.dtype)
    halves = (adapter.attention(block), adapter.mlp(block))
    try:
        adapter.attention(block).forward = lambda *args, **kwargs: adapter.as_attention_output(torch.zeros_like(tokens))
        adapter.mlp(block).forward = lambda *args, **kwargs: torch.zeros_like(tokens)
        with torch.no_grad():
            no_bias = {adapter.bias_name: None} if adapter.bias_name else {}
            after = adapter.call(block, type(block).forward, tokens, (), no_bias)
    finally:
        for module in halves:
            del module.forward
    if not torch.equal(after, tokens):
        raise UnsupportedModelError(
            f"{type(block).__name__} has something after its attention that adds to the tokens by itself, so no "
            "tokens can be taken away inside it; use bypass identity, borrow or merge"
        )
