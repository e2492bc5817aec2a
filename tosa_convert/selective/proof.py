"""The last proof of a model that no family knows: its selective layers do what they have to."""

from collections.abc import Callable

import torch
from torch import nn

from tosa_convert.models.adapter import Adapter, adapter_of, run
from tosa_convert.models.proof.calls import NotProvenError, alike, first_of
from tosa_convert.selective.selection import chosen_tokens


@torch.no_grad()
def prove_selection(model: nn.Module, converted: Callable[..., nn.Module]) -> None:
    """At ratio 1.0 a model gives what it gave; at ratio 0.5 what the original gives when the skipped tokens of a layer
    are masked as keys and restored after it.

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
    layer = len(adapter.blocks) // 2 + 1
    options = {"score": "norm", "bypass": "identity", "schedule": "all", "layers": [layer]}
    same = run(converted(model, **options, ratio=1.0), image)
    if not all(alike(same[key], value) for key, value in wanted.items()):
        raise NotProvenError(f"{name} gives something else with a selective layer that skips no token")
    selective = converted(model, **options, ratio=0.5)
    found = run(selective, image)
    _mask(adapter, adapter.blocks[layer - 1], chosen_tokens(selective)[layer])
    if not all(alike(found[key], value) for key, value in run(model, image).items()):
        raise NotProvenError(
            f"layer {layer} of {name}, made selective, is not the original with its skipped tokens masked and restored"
        )


def _mask(adapter: Adapter, block: nn.Module, chosen: torch.Tensor) -> None:
    """From here on nobody in a block looks at the tokens that are not chosen, and these leave it as they came."""
    attention, forward = adapter.attention(block), block.forward

    def attend(*args, **kwargs):
        tokens = args[0] if args else kwargs["hidden_states"]
        hidden = torch.full(tokens.shape[:2], float("-inf"), device=tokens.device, dtype=tokens.dtype)
        bias = hidden.scatter(1, chosen, 0.0)[:, None, None, :].expand(-1, -1, tokens.shape[1], -1)
        joined, weights = adapter.attend(attention, *adapter.project(attention, tokens, kwargs), bias)
        return adapter.finish(attention, joined.transpose(1, 2).flatten(2), tokens, weights)

    def masked(tokens, *args, **kwargs):
        updated = first_of(forward(tokens, *args, **kwargs))
        attends = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device).scatter(1, chosen, True)
        return adapter.given_back(torch.where(attends[..., None], updated, tokens))

    attention.forward, block.forward = attend, masked
