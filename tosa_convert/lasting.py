"""Layers behind which tokens are gone, as ToMe and EViT have them: between attention and MLP some are
dropped, fused or merged, and the layers behind run on the rest.

The halves of a block are run by its own forward, twice: once with its MLP silent, once with its attention.
A silent module gives zeros, so that its branch adds nothing.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from tosa_convert.bypasses import LASTING
from tosa_convert.errors import UnsupportedModelError, UsageError
from tosa_convert.hosts import Host
from tosa_convert.selective import Selection, grafted_class, listen
from tosa_convert.tokens import gather_tokens

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
                f"behind layers with bypass {self.bypass} there are fewer tokens than patches, so no maps; ask for "
                "output_fmt='NLC' or reshape=False, or convert with identity, borrow or merge"
            )
        return self.method(*args, **kwargs)


@dataclass
class Reduction(Selection):
    """The choice of one layer behind which tokens are gone.

    Attributes:
        reduces: whether this layer takes tokens away, or only lives with what is left.
        last: whether it is the model's last layer, where fused and merged tokens are put back.
        features: (B, N, D), the mean of this layer's keys over its heads, if partners have to be found.
    """

    reduces: bool = True
    last: bool = False
    features: torch.Tensor | None = None
    silent: str | None = None  # "attention" or "mlp", while the other half runs

    @property
    def selects(self) -> bool:
        return self.active and self.reduces

    def forget(self) -> None:
        super().forget()
        self.features = None

    @contextmanager
    def without(self, half: str) -> Iterator[None]:
        self.silent = half
        try:
            yield
        finally:
            self.silent = None


@functools.cache
def reducing_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a host's block that takes tokens away between its attention and its MLP."""

    def forward(self, tokens, *args, **kwargs):
        selection, host = self.selection, self.selection_host
        if not selection.active:
            return base.forward(self, tokens, *args, **kwargs)
        host.check_arguments(selection.layer, args, kwargs)
        drops = selection.bypass == "drop"
        groups = None if drops else selection.passage.entering(selection.layer, tokens)
        sizes = groups.sizes if selection.bypass == "persist" else None
        if not selection.reduces:
            tokens = host.call(self, base.forward, tokens, args, kwargs, sizes=sizes)
        else:
            with selection.without("mlp"):
                tokens = host.call(self, base.forward, tokens, args, kwargs, sizes=sizes)
            tokens, groups = _reduce(self, tokens, groups)
            with selection.without("attention"):
                tokens = base.forward(self, tokens, *args, **kwargs)
        selection.passage.leave(selection.layer, groups)
        return gather_tokens(tokens, groups.places) if selection.last and not drops else tokens

    def _reduce(self, tokens, groups):
        selection = self.selection
        choice = selection.choose(self.selector, selection.passage.patches, features=None)
        if self.matcher is not None:
            choice = selection.choice = self.matcher(selection.features, choice)
        return LASTING[selection.bypass](tokens, choice, groups, selection.scores)

    def listen_for_partners(self, queries, keys):
        if self.selection.selects:
            self.selection.features = keys.mean(1).detach()

    return grafted_class("Reducing", base, forward=forward, listen=listen, listen_for_partners=listen_for_partners)


@functools.cache
def silenceable_class(base: type[nn.Module], half: str) -> type[nn.Module]:
    """A subclass of a block's attention or MLP that gives zeros while its half is silent."""

    def forward(self, *args, **kwargs):
        if self.selection.silent != half:
            return base.forward(self, *args, **kwargs)
        tokens = args[0] if args else kwargs["hidden_states"]
        nothing = torch.zeros_like(tokens[:, :1])
        return self.selection_host.as_attention_output(nothing) if half == "attention" else nothing

    return grafted_class("Silenceable", base, forward=forward)


def check_halves(host: Host, block: nn.Module) -> None:
    """A block with both halves silent must leave its tokens as they are.

    Raises:
        UnsupportedModelError: it does not, so its halves cannot be run apart.
    """
    weight = next(block.parameters())
    tokens = torch.ones(1, 2, host.width, device=weight.device, dtype=weight.dtype)
    halves = (host.attention(block), host.mlp(block))
    try:
        host.attention(block).forward = lambda *args, **kwargs: host.as_attention_output(torch.zeros_like(tokens))
        host.mlp(block).forward = lambda *args, **kwargs: torch.zeros_like(tokens)
        with torch.no_grad():
            after = host.call(block, type(block).forward, tokens, (), {host.bias_name: None} if host.bias_name else {})
    finally:
        for module in halves:
            del module.forward
    if not torch.equal(after, tokens):
        raise UnsupportedModelError(
            f"{type(block).__name__} has something behind its attention that adds to the tokens by itself, so no "
            "tokens can be taken away inside it; use bypass identity, borrow or merge"
        )
