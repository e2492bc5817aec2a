"""A block's own forward on a row of several images, each with its own number of tokens.

Projections, norms and MLP run on the whole row at once; the attention of each image is worked out by itself, where the
block asks for it by torch's ``scaled_dot_product_attention``. Blocks that attend in another way, look at the places of
tokens, or were called with a mask run image by image.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tosa_convert.base.errors import TosaError, is_out_of_memory
from tosa_convert.methods.score import Score
from tosa_convert.methods.token_ops import Packed
from tosa_convert.models.adapter import Adapter
from tosa_convert.selective.containers import Containers
from tosa_convert.selective.forward_state import ForwardState
from tosa_convert.selective.row_attention import attend

Call = Callable[..., torch.Tensor]
"""(tokens (1, K, D), args, kwargs, places (1, K), sizes (1, K), normed (1, K, D)) → tokens."""


class Row:
    """A row that is running.

    Args:
        lengths: how many tokens there are of each image.
        padding: how many there are behind them that are of none.
    """

    def __init__(self, lengths: tuple[int, ...], padding: int = 0):
        self.lengths, self.total = lengths, sum(lengths) + padding
        self.heard: dict[int, list] = {}

    def hear(self, layer: int, score: Score, queries: torch.Tensor, keys: torch.Tensor) -> list:
        """Let the score of a layer read queries and keys (1, H, K, D), of the row or of its next image → what it has
        read so far, image by image."""
        heard = self.heard.setdefault(layer, [])
        if queries.shape[2] == self.total:
            parts = [each[:, :, : sum(self.lengths)].split(self.lengths, dim=2) for each in (queries, keys)]
            heard.extend(score(*pair) for pair in zip(*parts, strict=True))
        else:
            heard.append(score(queries, keys))
        return heard


ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
"""Of scaled_dot_product_attention, that may be given by place."""


class _WithinImages(TorchFunctionMode):
    """Makes attention over a row attention within each of its images; what pads it gets zeros."""

    def __init__(self, lengths: tuple[int, ...], padding: int, container: int | None = None):
        super().__init__()
        self.lengths, self.padding, self.asked = lengths, padding, False
        self.container = None if container is None else min(container, sum(lengths))  # more is never filled

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        given = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
        inputs, mask = [given.pop(name) for name in ARGUMENTS[:3]], given.pop("attn_mask", None)
        real = sum(self.lengths)
        if inputs[0].shape[-2] != real + self.padding:
            return function(*args, **kwargs)
        self.asked = True
        inputs = [each[..., :real, :] for each in inputs]
        if mask is not None:  # one row of it may be for all
            mask = mask[..., :real, :real]
        if self.container is not None:
            found = Containers(self.lengths, self.container, inputs[0].device).attend(*inputs, mask, **given)
        else:
            found = attend(*inputs, self.lengths, mask, **given)
        return F.pad(found, (0, 0, 0, self.padding)) if self.padding else found


@torch.compiler.disable(reason="a row of another length would have to be compiled anew")
def run_row(
    block: nn.Module,
    call: Call,
    tokens: torch.Tensor,
    args: tuple,
    kwargs: dict,
    packed: Packed,
    sizes: torch.Tensor | None = None,
    normed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run a block on a row of images, (1, K, D) → (1, K, D).

    Args:
        args, kwargs: what the block was called with after its tokens, for the batch.
        packed: which tokens of which images these are.
        sizes: (1, K) for how many tokens each stands in the attention.
        normed: (1, K, D) what the block's first norm is to give.

    Raises:
        TosaError: the row does not fit into memory.
    """
    if not packed.lengths:  # an empty batch
        return call(tokens, args, kwargs, packed.places, sizes, normed)
    try:
        return _run_row(block, call, tokens, args, kwargs, packed, sizes, normed)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise TosaError(
            f"{len(packed.lengths)} images make a row of {tokens.shape[1]} tokens of {tokens.shape[2]} channels, which "
            "does not fit into memory; use a smaller batch (--batch-size)"
        ) from error


def _run_row(block, call: Call, tokens, args: tuple, kwargs: dict, packed: Packed, sizes, normed) -> torch.Tensor:
    adapter, state, (lengths, places) = block.adapter, block.selection.current.state, packed
    if _as_one(block, adapter, args, kwargs):
        container, padding = getattr(block.selection.bypass.options, "container", None), _padding(tokens)
        padded = _padded(places, padding), _padded(sizes, padding, 1), _padded(normed, padding)
        with _running(state, lengths, padding), _WithinImages(lengths, padding, container) as within:
            found = call(_padded(tokens, padding), args, kwargs, *padded)
        if within.asked:
            return found[:, : tokens.shape[1]]
        block.selection.attends_elsewhere = True
    parts = [_split(each, lengths) for each in (tokens, places, sizes, normed)]
    with _running(state, lengths):
        found = [
            call(those, *_of_image((args, kwargs), index, len(lengths)), *others)
            for index, (those, *others) in enumerate(zip(*parts, strict=True))
        ]
    return torch.cat(found, dim=1)


def _as_one(block: nn.Module, adapter: Adapter, args: tuple, kwargs: dict) -> bool:
    """Whether a row can run as one."""
    if block.selection.attends_elsewhere or adapter.shows_attention or adapter.relative:
        return False
    # Known beforehand where it can be: gradient checkpointing repeats a run, and not that it was found out in it.
    learns = block.training or torch.is_grad_enabled()
    if learns and any(getattr(module, "fused_attn", True) is False for module in block.modules()):
        return False
    if adapter.mask(args, kwargs) is not None:
        return False
    return not (block.training and any(_drops_images(module) for module in block.modules()))


def _drops_images(module: nn.Module) -> bool:
    """Stochastic depth leaves out whole images, of which a row looks like one."""
    return type(module).__name__.endswith("DropPath") and getattr(module, "drop_prob", 0.0)


def _padding(tokens: torch.Tensor) -> int:
    """By how many tokens a row is made longer, at most by a thirty-second: in half precision on a CPU, oneDNN prepares
    each length that it has not met anew, which takes as long as the product itself, and keeps what it has prepared."""
    half = tokens.dtype.itemsize < 4 or torch.is_autocast_enabled("cpu")
    if tokens.device.type != "cpu" or not half:
        return 0
    return -tokens.shape[1] % (1 << max(0, tokens.shape[1].bit_length() - 6))


def _padded(values: torch.Tensor | None, count: int, filling: float = 0) -> torch.Tensor | None:
    """(1, K) or (1, K, D), longer by so many tokens."""
    if values is None or not count:
        return values
    return F.pad(values, (0, 0) * (values.ndim - 2) + (0, count), value=filling)


@contextmanager
def _running(state: ForwardState, lengths: tuple[int, ...], padding: int = 0) -> Iterator[None]:
    state.row = Row(lengths, padding)
    try:
        yield
    finally:
        state.row = None


def _split(values: torch.Tensor | None, lengths: tuple[int, ...]) -> tuple:
    return (None,) * len(lengths) if values is None else values.split(lengths, dim=1)


def _of_image(arguments: Any, index: int, batch: int) -> Any:
    """Arguments for a batch → for one of its images: masks and rotary positions that are given image by image."""

    def narrowed(value: Any) -> Any:
        each = isinstance(value, torch.Tensor) and value.ndim == 4 and len(value) == batch
        return value[index : index + 1] if each else value

    return pytree.tree_map(narrowed, arguments)
