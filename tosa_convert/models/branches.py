"""The two branches of a block, and how one of them is made to add nothing to the tokens."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from tosa_convert.models.subclassing import Unheard, answered

Branch = list[tuple[nn.Module, Callable[..., Any]]]
"""The modules that do its work, each with what answers for it while the branch is silent."""


@contextmanager
def silenced(branch: Branch) -> Iterator[None]:
    """Within this block of code the branch adds nothing."""
    (module, answer), *others = branch
    with answered(module, Unheard(answer)), silenced(others) if others else nullcontext():
        yield


def nothing(*args: Any, **kwargs: Any) -> torch.Tensor:
    """(B, 1, C) of zeros for tokens (B, N, C)."""
    tokens = args[0] if args else kwargs["hidden_states"]
    return torch.zeros_like(tokens[:, :1])


def two_modules(
    attention: nn.Module, mlp: nn.Module, as_output: Callable[[torch.Tensor], Any]
) -> tuple[Branch, Branch]:
    """Attention and MLP, where each is a module.

    Args:
        as_output: gives tokens in the form in which the attention returns them.
    """
    silent = lambda *args, **kwargs: as_output(nothing(*args, **kwargs))  # noqa: E731
    return [(attention, silent)], [(mlp, nothing)]
