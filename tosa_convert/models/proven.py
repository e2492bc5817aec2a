"""Any ViT of transformers that no family knows, once it is proven what its parts do.

Nothing is taken from a list of names: the row of blocks is found by what runs, the parts of a block by what they do to
tokens, and each finding is proven on the model at hand, see :mod:`tosa_convert.models.proof`. What is found is kept on
the model as ``tosa_proof``, and with its runs.
"""

import functools
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tosa_convert.models import unsupported
from tosa_convert.models.adapter import Adapter
from tosa_convert.models.families.transformers_vit import TransformersVit
from tosa_convert.models.hooks import PairTap, ProjectionTap
from tosa_convert.models.preprocessing import Preprocessing
from tosa_convert.models.proof.attention import form, project
from tosa_convert.models.proof.block import take_apart
from tosa_convert.models.proof.calls import NotProvenError, first_of
from tosa_convert.models.proof.row import find_row
from tosa_convert.models.proof.structure import Structure
from tosa_convert.models.subclassing import answered

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
    if model.config.model_type in unsupported.TRANSFORMERS:  # a reason that is known says more than a proof that fails
        return None
    structure = prove(model)
    model.tosa_proof = structure.model_dump()
    return ProvenVit(model, structure)


def image_config(model: nn.Module) -> Any:
    """The config that says how large images and patches are; None where none does."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return next((config for config in configs if getattr(config, "patch_size", None) and _size(config)), None)


def prove(model: nn.Module) -> Structure:
    """Find a model's parts and prove what they do, on a random image of the model's own size; the model stays as it is.

    Raises:
        NotProvenError: which proof failed, and where.
    """
    config, weight = image_config(model), next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, channels_of(config), *_size(config), generator=generator).to(weight)
    with _in_eval(model):
        try:
            name = input_name(model)
            row = find_row(model, lambda image: forward_of(model)(**{name: as_taken(name, image)}), image)
        except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
            raise NotProvenError(
                f"{type(model).__name__} does not run on an image alone ({' '.join(str(error).split())[:120]}); "
                "convert its vision part"
            ) from error
        if row.suffix:
            raise NotProvenError(
                f"the blocks of {type(model).__name__} run on {row.suffix} tokens after its patches (for detection or "
                "grouping), which are not supported yet"
            )
        where = f"{row.name}.0 ({type(row.blocks[0]).__name__})"
        parts = take_apart(row.blocks[0], row.first, where)
    return Structure(
        row=row.name,
        layers=len(row.blocks),
        projection=row.projection,
        prefix=row.prefix,
        width=row.first.tokens.shape[-1],
        **parts._asdict(),
    )


def channels_of(config: Any) -> int:
    """Of the images; a config that does not tell means three."""
    return 1 if hasattr(config, "num_mel_bins") else getattr(config, "num_channels", 3)


def forward_of(model: Any):
    """What takes images: the model, or of one of images and texts its image branch."""
    return model.get_image_features if hasattr(model, "get_text_features") else model


def input_name(model: Any) -> str:
    """The keyword of the images."""
    taken = inspect.signature(getattr(forward_of(model), "forward", forward_of(model))).parameters
    return next((name for name in ("pixel_values", "input_values") if name in taken), model.main_input_name)


def as_taken(name: str, images: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) as the model takes them: a spectrogram, which is one of its frequencies and times, comes as
    (B, times, frequencies)."""
    return images[:, 0].mT if name == "input_values" else images


def _size(config: Any) -> tuple[int, int] | None:
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return config.num_mel_bins, config.max_length
    size = getattr(config, "image_size", None)
    return (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (list, tuple)) else None


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class ProvenVit(TransformersVit):
    """A model whose parts were proven."""

    def __init__(self, model: nn.Module, structure: Structure):
        self.structure = structure
        super().__init__(model, list(model.get_submodule(structure.row))[: structure.layers])
        taken = inspect.signature(type(self.blocks[0]).forward).parameters
        self.bias_name = MASK if MASK in taken else None
        self.halves = structure.mlp is not None

    def _prefix_tokens(self, block):
        return self.structure.prefix

    @property
    def _vision_config(self):
        return image_config(self.model)

    def attention(self, block):
        return block.get_submodule(self.structure.attention)

    def mlp(self, block):
        return block.get_submodule(self.structure.mlp)

    def norm(self, block):
        return None if self.structure.norm is None else block.get_submodule(self.structure.norm)

    @property
    def patch_projection(self):
        return self.model.get_submodule(self.structure.projection)

    @property
    def heads(self):
        return self.structure.heads.count

    def tap(self, block, receive, detach=True):
        kind = _PairTap if self.structure.heads.order == "apart" else _FusedTap
        return kind(self, block, receive, detach)

    def projections(self, attention):
        return tuple(attention.get_submodule(name) for name in self.structure.heads.projections)

    def project(self, attention, tokens, arguments):
        return project(attention, self.structure.heads, tokens)

    def attend(self, attention, queries, keys, values, bias):
        dropout = self.attention_dropout(attention) if attention.training else 0.0
        scale = self.structure.heads.scale
        found = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, dropout_p=dropout, scale=scale)
        return found, None

    def finish(self, attention, joined, tokens, weights=None):
        output = self.structure.heads.output
        return self.as_attention_output(joined if output is None else attention.get_submodule(output)(joined), weights)

    def as_attention_output(self, tokens, weights=None):
        return _packed(self.structure.attention_returns, tokens, weights)

    def given_back(self, tokens):
        return _packed(self.structure.returns, tokens)

    def attention_dropout(self, attention):
        known = getattr(attention, "attention_dropout", None) or getattr(attention, "dropout", 0.0)
        return known if isinstance(known, float) else getattr(known, "p", 0.0)

    def steered(self, block):
        return [(self.attention(block), "forward")]

    def call(self, block, forward, tokens, args, kwargs, places=None, sizes=None):
        """Where tokens stand for several, the attention is answered for by what it was proven to do."""
        if sizes is None:
            return first_of(forward(block, tokens, *args, **kwargs))
        attention, bias = self.attention(block), sizes.log()[:, None, None, :]
        with answered(attention, functools.partial(self._attended, attention, bias)):
            return first_of(forward(block, tokens, *args, **kwargs))

    def _attended(self, attention: nn.Module, bias: torch.Tensor, *args, **kwargs):
        tokens = args[0] if args else kwargs["hidden_states"]
        found, weights = self.attend(attention, *self.project(attention, tokens, kwargs), bias)
        return self.finish(attention, found.transpose(1, 2).flatten(2), tokens, weights)

    @property
    def forward(self):
        return forward_of(self.model)

    @property
    def input_name(self):
        return input_name(self.model)

    def inputs(self, images):
        given = super().inputs(images)
        return {**given, self.input_name: as_taken(self.input_name, images)}

    @property
    def channels(self):
        return channels_of(self._vision_config)

    def preprocessing(self):
        grey = {"mean": (0.5,), "std": (0.5,)} if self.channels == 1 else {}
        return Preprocessing(size=_size(self._vision_config), channels=self.channels, **grey)

    def grid(self, size):
        """By the convolution that cuts the patches, which may overlap."""
        cut = self.patch_projection
        sides = zip(size, cut.kernel_size, cut.stride, cut.padding, strict=True)
        rows, columns = ((side + 2 * padding - kernel) // stride + 1 for side, kernel, stride, padding in sides)
        return rows, columns

    @property
    def patch(self):
        return tuple(self.patch_projection.stride)


def _packed(count: int, *values: Any):
    """The first value on its own, or so many in a tuple."""
    return (*values, *[None] * count)[:count] if count else values[0]


class _PairTap(PairTap):
    """On two projections."""

    def sources(self):
        return list(self.adapter.projections(self.attention)[:2])

    def formed(self, queries, keys):
        return form(self.attention, self.adapter.structure.heads, [queries, keys])


class _FusedTap(ProjectionTap):
    """On one projection of all three."""

    def sources(self):
        return list(self.adapter.projections(self.attention))

    def parted(self, projected):
        return form(self.attention, self.adapter.structure.heads, [projected])[:2]
