"""The last proof of a model that no family knows: its selective layers do what they have to."""

from collections.abc import Callable

import torch
from torch import nn

from tosa_convert.models.adapter import Adapter, adapter_of, run
from tosa_convert.models.proof.calls import NotProvenError, alike, first_of
from tosa_convert.models.proof.positions import named, names_of
from tosa_convert.models.subclassing import plain_class
from tosa_convert.selective.selection import chosen_tokens


@torch.no_grad()
def prove_selection(model: nn.Module, converted: Callable[..., nn.Module]) -> None:
    """At ratio 1.0 a model gives what it gave; at ratio 0.5 what the original gives when the tokens that layers skip
    are masked as keys in them and restored after.

    Args:
        model: a copy, which is changed.
        converted: gives a converted copy of a model for some options.

    Raises:
        NotProvenError: one of them does not hold.
    """
    model.eval()
    adapter, name = adapter_of(model), type(model).__name__
    preprocessing, weight = adapter.preprocessing(), next(model.parameters())
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, preprocessing.channels, *preprocessing.size, generator=generator).to(weight)
    wanted = run(model, image)
    options = {"score": "similarity", "bypass": "identity", "schedule": "all"}
    same = run(converted(model, **options, ratio=1.0), image)
    if not all(alike(same[key], value) for key, value in wanted.items()):
        raise NotProvenError(f"{name} gives something else with a selective layer that skips no token")
    selective = converted(model, **options, ratio=0.5)
    found = run(selective, image)
    for layer, chosen in chosen_tokens(selective).items():
        _mask(adapter, adapter.blocks[layer - 1], chosen)
    if not all(alike(found[key], value) for key, value in run(model, image).items()):
        raise NotProvenError(
            f"{name} with layers on half of its tokens is not the original with the others masked and restored"
        )


def _mask(adapter: Adapter, block: nn.Module, chosen: torch.Tensor) -> None:
    """From here on nobody in a block looks at the tokens that are not chosen, and these leave it as they came."""
    attention, forward = adapter.attention(block), block.forward

    def attending(tokens):
        """Which of the tokens do, (B, N, 1), in the order in which the model has them."""
        found = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device).scatter(1, chosen, True)
        return adapter.restored(found[..., None], tokens)

    def attend(*args, **kwargs):
        given = named(names_of(plain_class(attention).forward), args, kwargs)
        tokens = next(iter(given.values()))
        hidden = torch.zeros_like(tokens[..., :1]).masked_fill(~attending(tokens), float("-inf"))
        bias = hidden.mT[:, None].expand(-1, -1, tokens.shape[1], -1)
        joined, weights = adapter.attend(attention, *adapter.project(attention, tokens, given), bias)
        return adapter.finish(attention, joined.transpose(1, 2).flatten(2), tokens, weights)

    def masked(*args, **kwargs):
        tokens = adapter.entering(args, kwargs)[0]
        updated = first_of(forward(*args, **kwargs))
        return adapter.given_back(torch.where(attending(tokens), updated, tokens))

    attention.forward, block.forward = attend, masked
