"""transformers: ViT-MAE encoder, its masking turned off."""

from contextlib import contextmanager
from unittest import mock

import torch
from torch import nn

from tosa_convert.base.errors import UnsupportedModelError
from tosa_convert.models.adapter import Adapter
from tosa_convert.models.families.transformers_vit import TransformersVit, row_of_class
from tosa_convert.models.hooks import Hook

TRANSFORMERS = ("ViTMAELayer",)


def adapt(config) -> str | None:
    """Make a loaded configuration one of a model that can be converted; the class to load, if it is not its own."""
    if config.model_type != "vit_mae":
        return None
    config.mask_ratio = 0.0
    return "ViTMAEModel"


def find(model: nn.Module) -> Adapter | None:
    row = row_of_class(model, TRANSFORMERS)
    if row is None:
        return None
    if model.config.mask_ratio:
        raise UnsupportedModelError(
            f"{type(model).__name__} hides {model.config.mask_ratio:.0%} of its patches at random, for pre-training; "
            "set model.config.mask_ratio = 0 to convert it as an encoder"
        )
    return TransformersMae(model, row)


class TransformersMae(TransformersVit):
    """Without masking the encoder still shuffles its tokens, unless it is given noise that is sorted already: a
    converted one is, unless the caller gives another."""

    gives_maps = False

    def _prefix_tokens(self, block: nn.Module) -> int:
        return 1

    def inputs(self, images):
        return {**super().inputs(images), "noise": _sorted_noise(images, self.patch)}

    @property
    def _embeddings(self) -> nn.Module:
        return next(module for module in self.model.modules() if hasattr(module, "random_masking"))

    @contextmanager
    def exporting(self):
        """The masking of no token in order, which the graph need not work out."""
        with super().exporting(), mock.patch.object(self._embeddings, "random_masking", _nothing_masked):
            yield

    def prepare(self):
        self._embeddings.register_forward_pre_hook(_InOrder(self.patch), with_kwargs=True)


class _InOrder(Hook):
    def __init__(self, patch: tuple[int, int]):
        self.patch = patch

    def __call__(self, embeddings: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if len(args) > 1 or kwargs.get("noise") is not None:
            return None
        return args, {**kwargs, "noise": _sorted_noise(args[0] if args else kwargs["pixel_values"], self.patch)}


def _nothing_masked(tokens: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(B, N, C) and (B, N) → the tokens, the mask, and the order of the tokens."""
    return tokens, torch.zeros_like(noise), torch.arange(noise.shape[1], device=noise.device).expand(noise.shape)


def _sorted_noise(images: torch.Tensor, patch: tuple[int, int]) -> torch.Tensor:
    """(B, patches), ascending."""
    patches = (images.shape[-2] // patch[0]) * (images.shape[-1] // patch[1])
    in_order = torch.arange(patches, device=images.device, dtype=torch.float32)  # half precision has ties
    return in_order.expand(images.shape[0], patches)
