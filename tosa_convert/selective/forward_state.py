"""What one forward pass hands on from layer to layer beside its tokens."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from tosa_convert.base.errors import TosaError
from tosa_convert.base.thread_local import PerThread
from tosa_convert.methods.bypass import Groups
from tosa_convert.methods.token_ops import Choice
from tosa_convert.models.adapter import Adapter
from tosa_convert.models.hooks import Hook, Tap


class Segment(NamedTuple):
    """A choice that serves several layers, see :mod:`tosa_convert.selective.segment`.

    Attributes:
        choice: of the first of them.
        places: (B, N) in which group each token is; None where skipped ones are in none.
        sizes: (B, K) for how many tokens each group stands in the attention, if that is weighed.
    """

    choice: Choice
    places: torch.Tensor | None
    sizes: torch.Tensor | None


class Course(NamedTuple):
    """Groups on their way through layers.

    Attributes:
        entered: (B, N, D), the tokens that formed them.
        before: (B, K, D), the groups then.
        groups: (B, K, D), the groups now.
    """

    entered: torch.Tensor
    before: torch.Tensor
    groups: torch.Tensor


class Left(NamedTuple):
    """What a layer leaves to one that has the same choice.

    Attributes:
        segment, course: its groups; without the latter where they may have been changed on the way.
        tokens: (B, N, D), the tokens that left it.
        version: of these, since a hook may change them in place; None where torch does not count that.
    """

    segment: Segment
    course: Course | None
    tokens: torch.Tensor
    version: int | None


def version_of(tokens: torch.Tensor) -> int | None:
    """How often a tensor was changed in place; None where torch does not count that."""
    return tokens._version if may_run_again() else None


def may_run_again() -> bool:
    """Whether gradient checkpointing could run a block once more for this forward pass."""
    # Not only with gradients or in training: re-entrant checkpointing runs its first pass without, in eval mode too.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_inference_mode_enabled():
        return False
    return torch._C._functorch.maybe_current_level() is None  # torch.func's tensors have no memory of their own


class ForwardState:
    """One per forward pass, begun anew at the patch embedding. Layers are counted from 1.

    Attributes:
        grid: rows and columns of the patches, of a video's times before them; None where the model does not tell.
        share: of the tokens that layers are to take away; None for all.
        readings: layer → what its score has read, until the layer takes it.
        features: layer → (B, N, D), by which partners are found, until the layer takes it.
        scores: layer → (B, N).
        choices: layer → what it chose.
        groups: layer → where the tokens are after it, once some were taken away.
        left: layer → what it leaves to the next one, if that has the same choice, until it is taken.
        gates: layer → logits (B, N) of its gate, with gradients.
        weights: layer → (B, N), what multiplies what it adds to each token that attends, until it does.
        row: the row of images that a layer runs, while it does, where these keep different numbers of tokens.
        again: whether it is of a single layer, which gradient checkpointing runs once more in a thread of its own.
    """

    def __init__(self, grid: tuple[int, ...] | None, share: float | None = None, again: bool = False):
        self.grid = grid
        self.share = share
        self.again = again
        self.readings: dict[int, Any] = {}
        self.features: dict[int, torch.Tensor] = {}
        self.scores: dict[int, torch.Tensor] = {}
        self.choices: dict[int, Choice] = {}
        self.groups: dict[int, Groups] = {}
        self.left: dict[int, Left] = {}
        self.gates: dict[int, torch.Tensor] = {}
        self.weights: dict[int, torch.Tensor] = {}
        self.row: Any = None


class CurrentForward(Hook):
    """The state of the forward pass that is under way, for each thread its own. One per converted model.

    Args:
        adapter: of the model.
    """

    def __init__(self, adapter: Adapter):
        self.adapter = adapter
        self._state = PerThread()
        self._putting_back = PerThread()
        self._share = PerThread()
        self.recollection = Recollection()
        self.taps: list[Tap] = []

    def begin(self, projection: nn.Module, inputs: tuple, output: torch.Tensor | tuple) -> None:
        """A forward hook on the patch projection, which tells the grid.

        Raises:
            TosaError: the TorchScript exporter is at work, which silently fixes batch size and choices in its file.
        """
        if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
            raise TosaError(
                "torch.onnx.export(dynamo=False), which optimum calls, cannot export a token-selective model; use "
                "dynamo=True, or tosa-convert export, which also checks the file"
            )
        grid = self.adapter.grid_of(inputs, output)
        # In a trace, such as fvcore's, which is of one size, sizes are tensors.
        whole = tuple(int(side) if isinstance(side, torch.Tensor) else side for side in grid or ())
        self._state.set(ForwardState(whole or None, self._share.get()))
        for tap in self.taps:
            tap.follow()

    @property
    def state(self) -> ForwardState:
        state = self._state.get()
        if state is None:
            raise TosaError(
                "this thread has not begun a forward pass: run the model from its images on, convert it again if its "
                "patch embedding was replaced, and let gradient checkpointing run layer by layer"
            )
        return state

    @property
    def puts_back(self) -> bool:
        """Whether every token is put back after every layer: maps are made of several."""
        return self.adapter.gives_maps or bool(self._putting_back.get())

    @contextmanager
    def putting_back(self) -> Iterator[None]:
        """Within this block, and in this thread, every token is put back after every layer."""
        self._putting_back.set(True)
        try:
            yield
        finally:
            self._putting_back.set(None)

    @contextmanager
    def taking(self, share: float) -> Iterator[None]:
        """Within this block, and in this thread, layers take away this share of the tokens that they are to take."""
        self._share.set(share)
        try:
            yield
        finally:
            self._share.set(None)

    def begin_again(self, arrival: "Arrival") -> None:
        """Before a layer is run once more: autograd goes back through a GPU in a thread that has begun no pass."""
        if self.last is None:
            self._state.set(ForwardState(arrival.grid, arrival.share, again=True))

    def end_again(self) -> None:
        """After it: nobody takes what it leaves."""
        if self.last is not None and self.last.again:
            self._state.set(None)

    def forget(self) -> None:
        """Let go of what the last forward pass left."""
        self._state.set(None)
        self.recollection.forget_expired()

    @property
    def last(self) -> ForwardState | None:
        """What the last forward pass of this thread left."""
        return self._state.get()


class Arrival(NamedTuple):
    """What a layer takes from the layers before it, beside its tokens."""

    grid: tuple[int, ...] | None
    reading: Any
    groups: Groups | None
    scores: torch.Tensor | None
    attended: torch.Tensor | None
    segment: Segment | None = None
    padding: torch.Tensor | None = None
    share: float | None = None
    before: torch.Tensor | None = None
    puts_back: bool = False

    @property
    def patches(self) -> int:
        """Of the image, those that are gone by now included."""
        if self.grid is None:
            raise TosaError("the grid of patches is not known; run the model from its images on")
        return math.prod(self.grid)


class Recollection:
    """What layers took when certain tokens entered them.

    Gradient checkpointing runs a layer again for the backward pass, on the tokens it was given, when other forward
    passes may have begun since; the memory that holds those tokens tells which pass it was. Nothing is kept longer
    than the tokens are and the next layer takes to come: whole maps of attention may be among it.
    """

    def __init__(self):
        self._known: dict[tuple[int, int], tuple[StorageWeakRef, int, Arrival]] = {}

    def keep(self, layer: int, tokens: torch.Tensor, arrival: Arrival) -> None:
        self.forget_expired()
        storage = StorageWeakRef(tokens.untyped_storage())
        self._known[layer, storage.cdata] = (storage, tokens._version, arrival)

    def find(self, layer: int, tokens: torch.Tensor) -> Arrival | None:
        key = StorageWeakRef(tokens.untyped_storage()).cdata
        _, version, arrival = self._known.get((layer, key), (None, None, None))
        return arrival if version == tokens._version else None

    def forget_expired(self) -> None:
        for key in [key for key, (storage, _, _) in list(self._known.items()) if storage.expired()]:
            self._known.pop(key, None)

    def __reduce__(self):
        return Recollection, ()
