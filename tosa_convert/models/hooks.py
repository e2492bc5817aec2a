"""Taps: hooks that hand on an attention's queries and keys as its block computes them.

A tap stands on the modules that give them, and follows when these are replaced (by LoRA, a quantiser, or by hand), so
that what is read is always what the layer uses. It is an object, not a closure, and ``receive`` should be a method: a
deep copy of the model then carries copies that call the copied receiver.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tosa_convert.base.errors import TosaError
from tosa_convert.base.thread_local import PerThread

if TYPE_CHECKING:
    from tosa_convert.models.adapter import Adapter

Receive = Callable[[torch.Tensor, torch.Tensor], None]
"""Takes queries and keys, both (B, H, N, D)."""
PARTS = ("first", "second")
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
DEAF = PerThread()
"""Whether taps do not listen now, in this thread."""


class Hook:
    """A hook of ours, which :func:`remove_hooks` takes off again; or its methods are hooks."""


def remove_hooks(module: nn.Module, which: Callable[[Hook], bool] = lambda hook: True) -> None:
    """Take our hooks off a module."""
    for kind in HOOKS:
        hooks = getattr(module, kind)
        for key, hook in list(hooks.items()):
            owner = _owner(hook)
            if isinstance(owner, Hook) and which(owner):
                del hooks[key]
                getattr(module, f"{kind}_with_kwargs").pop(key, None)


def tapped(module: nn.Module) -> bool:
    """Whether a hook of ours stands on a module."""
    return any(
        isinstance(getattr(hook, "__self__", hook), Hook) for kind in HOOKS for hook in getattr(module, kind).values()
    )


def others_hook(module: nn.Module) -> bool:
    """Whether a hook of somebody else does, as that of weight norm. Those of fvcore, on every module while it counts,
    leave things as they are."""
    owners = [_owner(hook) for kind in HOOKS for hook in list(getattr(module, kind).values())]
    return any(not isinstance(owner, Hook) and not type(owner).__module__.startswith("fvcore") for owner in owners)


def _owner(hook: Any) -> Any:
    """The object that a hook is a method of, or the hook."""
    return getattr(hook, "__self__", hook)


@contextmanager
def unheard() -> Iterator[None]:
    """Within this block, and in this thread, projections are called beside a layer's own forward: no tap listens."""
    DEAF.set(True)
    try:
        yield
    finally:
        DEAF.set(None)


class Tap(Hook, ABC):
    """Passes the queries and keys of a block on, without gradients unless ``detach`` is False.

    Args:
        adapter: knows the parts of the block.
        block: whose attention is tapped.
        receive: is called once in each forward of the block.
    """

    def __init__(self, adapter: "Adapter", block: nn.Module, receive: Receive, detach: bool = True):
        self.adapter, self.block, self.receive, self.detach = adapter, block, receive, detach
        self.pending = PerThread()  # what has been taken so far, of this forward
        self.places: list[nn.Module] = []
        self.follow()

    @property
    def attention(self) -> nn.Module:
        return self.adapter.attention(self.block)

    @abstractmethod
    def sources(self) -> list[nn.Module]:
        """The modules on which the tap stands, looked up anew."""

    def follow(self) -> None:
        """Stand on the modules that are there now."""
        sources = self.sources()
        if len(sources) == len(self.places) and all(map(_same, sources, self.places)):
            if not torch.compiler.is_dynamo_compiling():
                for source in sources:
                    self.go_last(source)
            return
        if torch.compiler.is_dynamo_compiling():
            raise TosaError("the projections of a layer were replaced; run the model once before you compile it")
        self.remove()
        self.places = sources
        for index, source in enumerate(sources):
            remove_hooks(source, lambda hook: hook is self)  # quantisers copy hooks
            self.stand_on(source, index)

    def go_last(self, source: nn.Module) -> None:
        """Stand behind what others have hooked on a source since: what they make of it is what the layer uses. Other
        threads may run the model meanwhile, so the hook is not taken off for that."""
        for kind in HOOKS:
            hooks = getattr(source, kind)
            ahead = True
            for key, hook in list(hooks.items()):
                owner = _owner(hook)
                if owner is self:
                    ahead, mine = False, key
                elif not ahead and not isinstance(owner, Hook):
                    hooks.move_to_end(mine)
                    break

    def stand_on(self, source: nn.Module, index: int) -> None:
        """Hook the index-th of the sources."""
        source.register_forward_hook((self.take_first, self.take_second)[index])

    def remove(self) -> None:
        for place in self.places:
            remove_hooks(place, lambda hook: hook is self)
        self.places = []

    def take_first(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if not DEAF.get():
            self._take("first", self.cut(output))

    def take_second(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if not DEAF.get():
            self._take("second", self.cut(output))

    def _take(self, name: str, output: torch.Tensor) -> None:
        raise NotImplementedError

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """Without gradients, unless they are wanted."""
        return tensor.detach() if self.detach else tensor


def _same(one: Any, other: Any) -> bool:
    return one is other


class ProjectionTap(Tap):
    """On one projection that gives an attention's queries and keys together."""

    def _take(self, name, output):
        self.receive(*self.parted(output))

    @abstractmethod
    def parted(self, projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the projection gave, (B, N, ·) → queries and keys (B, H, N, D)."""


class PairTap(Tap):
    """On what gives an attention's queries and what gives its keys, whichever runs first."""

    parts = 2
    """How many outputs make queries and keys."""

    def _take(self, name, output):
        taken = {**(self.pending.get() or {}), name: output}
        wanted = PARTS[: self.parts]
        if all(part in taken for part in wanted):
            self.pending.set({key: value for key, value in taken.items() if key not in wanted} or None)
            self.receive(*self.formed(*(taken[part] for part in wanted)))
        else:
            self.pending.set(taken)

    def formed(self, *parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What was taken, of queries and of keys → these (B, H, N, D), as the attention compares them."""
        queries, keys = parts
        return queries, keys
