"""Any ViT of transformers that no family knows, once it is proven what its parts do.

Nothing is taken from a list of names: the row of blocks is found by what runs, the parts of a block by what they do to
tokens, and each finding is proven on the model at hand, see :mod:`tosa_convert.models.proof`. What is found is kept on
the model as ``tosa_proof``, and with its runs.
"""

import functools
import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tosa_convert.base.thread_local import PerThread
from tosa_convert.models import unsupported
from tosa_convert.models.adapter import Adapter
from tosa_convert.models.branches import two_modules
from tosa_convert.models.families.transformers_vit import TransformersVit
from tosa_convert.models.masks import mask_at, total, weight_of
from tosa_convert.models.preprocessing import Preprocessing
from tosa_convert.models.projections import QueryKey
from tosa_convert.models.proof.attention import form, normalised, project
from tosa_convert.models.proof.calls import first_of, packed
from tosa_convert.models.proof.images import (
    as_taken,
    channels_of,
    forward_of,
    image_config,
    input_name,
    size_of,
)
from tosa_convert.models.proof.positions import named, names_of, read, turned
from tosa_convert.models.proof.prove import in_float32, prove
from tosa_convert.models.proof.structure import Structure
from tosa_convert.models.rotary import RotaryTap, positions_at
from tosa_convert.models.subclassing import answered, plain_class
from tosa_convert.models.videos import standing_still

MASK = "attention_mask"


def find(model: nn.Module) -> Adapter | None:
    """The adapter of a model of transformers that takes images; None of any other.

    Raises:
        NotProvenError: which proof failed, and where.
    """
    known = getattr(model, "tosa_proof", None)
    if known is not None:
        return ProvenVit(model, Structure(**known))
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel) or image_config(model) is None:
        return None
    # A reason that is known says more than a proof that fails.
    packed_row = unsupported.GRIDS in names_of(type(model).forward)
    if packed_row or model.config.model_type in unsupported.TRANSFORMERS:
        return None
    structure = prove(in_float32(model))
    model.tosa_proof = structure.model_dump()
    return ProvenVit(model, structure)


class ProvenVit(TransformersVit):
    """A model whose parts were proven.

    Tokens after the patches, as for detection, count as prefix tokens: they are moved before the patches when a
    selective layer takes its tokens, and back when these leave it.
    """

    def __init__(self, model: nn.Module, structure: Structure):
        self.structure = structure
        self.running = PerThread()  # the places of the tokens that a block runs on, while it does
        super().__init__(model, list(model.get_submodule(structure.row))[: structure.layers])
        # Looked up once: torch.compile does not follow signatures.
        self.block_names = names_of(plain_class(self.blocks[0]).forward)
        self.attention_names = names_of(plain_class(self.attention(self.blocks[0])).forward)
        self.bias_name = MASK if MASK in self.block_names else None
        self.halves = structure.mlp is not None
        # A single token behind the patches stands for the image; several are for detection or grouping.
        self.class_token = structure.prefix > 0 or structure.suffix == 1
        self.relative = self.positions is not None
        self.own_heads = not structure.suffix

    def _prefix_tokens(self, block):
        return self.structure.prefix + self.structure.suffix

    @property
    def positions(self):
        """How queries and keys are turned, if they are."""
        return self.structure.heads.positions

    def taken(self, entering):
        return self.patches_last(entering, 1)

    def patches_last(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """With what stands after the patches moved before them."""
        prefix, suffix = self.structure.prefix, self.structure.suffix
        if not suffix:
            return tensor
        patches = tensor.shape[axis] - prefix - suffix
        before, middle, after = tensor.split([prefix, patches, suffix], dim=axis)
        return torch.cat([before, after, middle], dim=axis)

    def restored(self, tokens, entering):
        prefix, suffix = self.structure.prefix, self.structure.suffix
        if not suffix:
            return tokens
        before, after, middle = tokens.split([prefix, suffix, tokens.shape[1] - prefix - suffix], dim=1)
        return torch.cat([before, middle, after], dim=1)

    @property
    def _vision_config(self):
        return image_config(self.model)

    def attention(self, block):
        return block.get_submodule(self.structure.attention)

    def branches(self, block):
        return two_modules(self.attention(block), block.get_submodule(self.structure.mlp), self.as_attention_output)

    def norm(self, block):
        return None if self.structure.norm is None else block.get_submodule(self.structure.norm)

    @property
    def patch_projection(self):
        return self.model.get_submodule(self.structure.projection)

    @property
    def heads(self):
        return self.structure.heads.count

    def tap(self, block, receive, detach=True):
        return _ProvenTap(self, block, receive, detach)

    def projections(self, attention):
        return tuple(attention.get_submodule(name) for name in self.structure.heads.projections)

    def project(self, attention, tokens, arguments):
        queries, keys, values = project(attention, self.structure.heads, tokens)
        return *self.turned(queries, keys, arguments), values

    def turned(self, queries: torch.Tensor, keys: torch.Tensor, arguments: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """By the positions of the tokens that a block runs on, if there are any."""
        if self.positions is None:
            return queries, keys
        angles = self.angles(arguments[self.positions.name])
        return turned(self.positions, queries, *angles), turned(self.positions, keys, *angles)

    def query_and_key(self, attention):
        heads = self.structure.heads
        if heads.order == "heads qkv":
            return None
        return QueryKey.of(list(self.projections(attention)[:2]), not heads.norms and self.positions is None)

    def compared(self, attention, queries, keys, arguments):
        queries, keys = normalised(attention, self.structure.heads, queries.transpose(1, 2), keys.transpose(1, 2))
        return self.turned(queries.transpose(1, 2), keys.transpose(1, 2), arguments)

    def angles(self, value: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the tokens that a block runs on, from what its attention is called with."""
        cosines, sines = read(self.positions, value)
        places = self.running.get()
        if places is None:
            return cosines, sines
        if self.positions.patches_only:
            places = places[:, self.prefix :] - self.prefix
        else:
            cosines, sines = (self.patches_last(each, -2) for each in (cosines, sines))
        cosines, sines = (positions_at(each[0, 0] if len(each) == 1 else each, places) for each in (cosines, sines))
        return cosines, sines

    def scale(self, queries):
        return self.structure.heads.scale

    def attend(self, attention, queries, keys, values, bias):
        if self.shows_attention:
            return super().attend(attention, queries, keys, values, bias)
        dropout = self.attention_dropout(attention) if attention.training else 0.0
        scale = self.structure.heads.scale
        found = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, dropout_p=dropout, scale=scale)
        return found, None

    def finish(self, attention, joined, tokens, weights=None):
        output = self.structure.heads.output
        return self.as_attention_output(joined if output is None else attention.get_submodule(output)(joined), weights)

    def as_attention_output(self, tokens, weights=None):
        return packed(self.structure.attention_returns, tokens, weights)

    def given_back(self, tokens):
        return packed(self.structure.returns, tokens)

    def attention_dropout(self, attention):
        names = ("attention_dropout", "dropout_prob", "dropout")
        known = next((found for name in names if (found := getattr(attention, name, None))), 0.0)
        return known if isinstance(known, float) else getattr(known, "p", 0.0)

    def steered(self, block):
        return [(self.attention(block), "forward")]

    def check_arguments(self, layer, args, kwargs):
        known = named(self.block_names, (None, *args), kwargs)
        if self.positions is not None:
            known.pop(self.positions.name)
        super().check_arguments(layer, (), known)

    def given(self, args, kwargs):
        mask = self.mask(args, kwargs)
        if not torch.compiler.is_exporting() or mask is None:
            return args, kwargs
        keywords = {name: None if value is mask else value for name, value in kwargs.items()}
        return tuple(None if value is mask else value for value in args), keywords

    def mask(self, args, kwargs):
        given = named(self.block_names, (None, *args), kwargs).get(MASK)
        return given if isinstance(given, torch.Tensor) else None

    def call(self, block, forward, tokens, args, kwargs, places=None, sizes=None):
        """Where places matter or tokens stand for several, the attention is answered for by what it was proven to
        do."""
        attention = self.attention(block)
        self.running.set(places)
        try:
            if sizes is None and (places is None or not (self.relative or self.mask(args, kwargs) is not None)):
                return first_of(forward(block, tokens, *args, **kwargs))
            with answered(attention, functools.partial(self.by_parts, attention, sizes), otherwise=True):
                return first_of(forward(block, tokens, *args, **kwargs))
        finally:
            self.running.set(None)

    def by_parts(self, attention, sizes, *args, **kwargs):
        given = named(self.attention_names, args, kwargs)
        tokens, mask = next(iter(given.values())), given.get(MASK)
        bias = total(weight_of(sizes), None if mask is None else mask_at(mask, self.running.get(), tokens.dtype))
        attend = self.attending.get() or self.attend
        found, weights = attend(attention, *self.project(attention, tokens, given), bias)
        return self.finish(attention, found.transpose(1, 2).flatten(2), tokens, weights)

    @property
    def forward(self):
        return forward_of(self.model)

    @property
    def input_name(self):
        return input_name(self.model)

    def inputs(self, images):
        """A model of videos takes an image as a video that stands still."""
        given = super().inputs(images)
        if self.structure.frames:
            images = standing_still(images, self.structure.frames)
        return {**given, self.input_name: as_taken(self.input_name, images)}

    @property
    def channels(self):
        return channels_of(self._vision_config)

    def preprocessing(self):
        grey = {"mean": (0.5,), "std": (0.5,)} if self.channels == 1 else {}
        return Preprocessing(size=size_of(self._vision_config), channels=self.channels, **grey)

    def grid(self, size):
        """By the convolution that cuts the patches, which may overlap."""
        cut = self.patch_projection
        if isinstance(cut, nn.Linear):
            return tuple(side // patch for side, patch in zip(size, self.patch, strict=True))
        sides = size if len(cut.stride) == len(size) else (self.structure.frames, *size)
        each = zip(sides, cut.kernel_size, cut.stride, _padded(cut), strict=True)
        return tuple((side + padding - kernel) // stride + 1 for side, kernel, stride, padding in each)

    @property
    def patch(self):
        cut = self.patch_projection
        return super().patch if isinstance(cut, nn.Linear) else tuple(cut.stride[-2:])

    def grid_of(self, inputs, output):
        """Where patches are projected that were cut before, the model's own if they fill it, or square; else a row."""
        if output.ndim != 3:
            return super().grid_of(inputs, output)
        own, count = self.grid(size_of(self._vision_config)), output.shape[1]
        if not isinstance(count, int) or count == math.prod(own):
            return own
        side = math.isqrt(count)
        return (side, side) if side * side == count else (count,)

    def tokens(self, images):
        """With those that stand after the patches moved before them."""
        return self.patches_last(super().tokens(images), 1)


def _padded(cut: nn.Conv2d | nn.Conv3d) -> tuple[int, ...]:
    """By how many pixels in all a convolution pads each axis."""
    by_name = {"valid": (0,) * len(cut.kernel_size), "same": tuple(kernel - 1 for kernel in cut.kernel_size)}
    return by_name[cut.padding] if isinstance(cut.padding, str) else tuple(2 * padding for padding in cut.padding)


class _ProvenTap(RotaryTap):
    """On two projections or on one of all three, and on the attention where that is called with positions."""

    def sources(self):
        projections = list(self.adapter.projections(self.attention)[:2])
        return projections if self.adapter.positions is None else [*projections, self.attention]

    def stand_on(self, source, index):
        super().stand_on(source, 2 if source is self.attention else index)

    @property
    def parts(self):
        return len(self.adapter.structure.heads.projections[:2])

    def positions_in(self, args, kwargs):
        given = named(self.adapter.attention_names, args, kwargs)
        return self.adapter.angles(given[self.adapter.positions.name])

    def formed(self, *parts):
        adapter = self.adapter
        queries, keys = form(self.attention, adapter.structure.heads, list(parts))[:2]
        if adapter.positions is not None:
            angles = self.pending.take()["positions"]
            queries, keys = (turned(adapter.positions, each, *angles) for each in (queries, keys))
        if adapter.running.get() is None:  # in the model's own order
            queries, keys = (adapter.patches_last(each, 2) for each in (queries, keys))
        return queries, keys
