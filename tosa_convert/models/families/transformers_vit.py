"""transformers: ViT, DeiT, DINOv2 (with registers too), CLIP, SigLIP, AIMv2, Depth-Anything.

Vision towers alone and beside their text towers, backbones, and dense heads on these.
"""

import inspect
import os
import sys
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from tosa_convert.base.errors import UnsupportedModelError, UsageError, gist
from tosa_convert.models.adapter import Adapter
from tosa_convert.models.hooks import Hook, PairTap
from tosa_convert.models.preprocessing import Preprocessing
from tosa_convert.models.projections import QueryKey, split_heads
from tosa_convert.models.proof.calls import first_of
from tosa_convert.models.symbolic_sizes import open_numbers

POOLING = "add_pooling_layer"
"""What classes of transformers call it that a model may be made without its pooler."""
PREFIX_TOKENS = {
    "ViTLayer": lambda config: 1,
    "DeiTLayer": lambda config: 2,
    "Dinov2Layer": lambda config: 1,
    "Dinov2WithRegistersLayer": lambda config: 1 + config.num_register_tokens,
    "CLIPEncoderLayer": lambda config: 1,
    "SiglipEncoderLayer": lambda config: 0,
    "Aimv2EncoderLayer": lambda config: 0,
}
"""Layer class → how many tokens stand in front of the patches."""
TRANSFORMERS = tuple(PREFIX_TOKENS)
FIRST_NORMS = ("norm1", "layernorm_before", "layer_norm1", "rms_norm1")
UNMASKED = "sdpa_without_mask"
BY_CLASS_TOKEN = {f"{name}ForImageClassification" for name in ("ViT", "DeiT", "ViTMSN")}
"""Others take patches into what they classify by, such as their mean beside the class token."""
TEXTS = {"input_ids", "decoder_input_ids"}
"""What models of texts are called with."""


def find(model: nn.Module) -> Adapter | None:
    row = row_of(model, _sees_patches)
    return None if row is None else TransformersVit(model, row)


def row_of(model: nn.Module, understood: Callable[[nn.Module], bool]) -> list[nn.Module] | None:
    """The row of layers in a model of transformers whose first layer is understood.

    Raises:
        UnsupportedModelError: there are several.
    """
    transformers = sys.modules.get("transformers")  # a model of its making has imported it
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return None
    lists = {name: list(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    rows = {name: row for name, row in lists.items() if row and understood(row[0])}
    if len(rows) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} has {len(rows)} rows of layers, {', '.join(rows)}; convert the part with the one "
            "that you mean"
        )
    if rows:
        _refuse_texts(model, next(iter(rows)))
    return next(iter(rows.values()), None)


def _refuse_texts(model: nn.Module, row: str) -> None:
    """
    Raises:
        UnsupportedModelError: the model takes images together with texts, and has no branch for images alone.
    """
    if hasattr(model, "get_text_features") or not _takes_texts(model):
        return
    names = row.split(".")
    outer = (".".join(names[:count]) for count in range(1, len(names)))
    part = next(name for name in outer if not _takes_texts(model.get_submodule(name)))
    raise UnsupportedModelError(
        f"{type(model).__name__} takes images together with texts; convert its vision part, model.{part}"
    )


def _takes_texts(part: nn.Module) -> bool:
    return not TEXTS.isdisjoint(inspect.signature(part.forward).parameters)


def row_of_class(model: nn.Module, known: Container[str]) -> list[nn.Module] | None:
    """:func:`row_of` the layers of known classes."""
    return row_of(model, lambda layer: layer_class(layer, known) is not None)


def _sees_patches(layer: nn.Module) -> bool:
    """Of an understood class, and in a vision tower: CLIP and SigLIP build their text towers from the same layers."""
    configs = [getattr(module, "config", None) for module in layer.children()]
    return layer_class(layer, PREFIX_TOKENS) is not None and any(hasattr(config, "patch_size") for config in configs)


def layer_class(layer: nn.Module, known: Container[str]) -> str | None:
    """Which of the known classes a layer is of, also when the layer is selective by now."""
    return next((kind.__name__ for kind in type(layer).__mro__ if kind.__name__ in known), None)


class _Catch(Hook):
    """Keeps what may be the tokens of a model whose modules it is on."""

    def __init__(self, adapter: "TransformersVit"):
        self.adapter = adapter
        self.caught: list[torch.Tensor] = []

    def __call__(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        last = module is self.adapter.blocks[-1]
        found = first_of(output) if last else getattr(output, "last_hidden_state", None)
        if found is not None and found.ndim == 3 and found.shape[-1] == self.adapter.width:
            self.caught.append(found)


class TransformersVit(Adapter):
    library = "transformers"
    bias_name = "attention_mask"

    def __init__(self, model: nn.Module, blocks: list[nn.Module]):
        super().__init__(model)
        self.blocks = blocks
        self.prefix = self._prefix_tokens(blocks[0])
        self.class_token = self.prefix > 0
        self.width = self._vision_config.hidden_size

    def _prefix_tokens(self, block: nn.Module) -> int:
        return PREFIX_TOKENS[layer_class(block, PREFIX_TOKENS)](self.attention(block).config)

    def norm(self, block):
        return next(child for name, child in block.named_children() if name in FIRST_NORMS)

    @property
    def patch_projection(self) -> nn.Module:
        """The first convolution; CLIP's text tower has none."""
        return next(module for module in self.model.modules() if isinstance(module, nn.Conv2d))

    @property
    def gives_maps(self) -> bool:
        """As backbones do, also those under a dense head, and what BEiT's own head for segmentation reads."""
        kinds = (kind.__name__ for module in self.model.modules() for kind in type(module).__mro__)
        return any(name.endswith(("Backbone", "ForSemanticSegmentation")) for name in kinds)

    @property
    def classifies_by_class_token(self) -> bool:
        return any(kind.__name__ in BY_CLASS_TOKEN for kind in type(self.model).__mro__) and self.class_token

    def as_attention_output(self, tokens, weights=None):
        return tokens, weights

    @property
    def heads(self) -> int:
        return self._vision_config.num_attention_heads

    def tap(self, block, receive, detach=True):
        return _HeadsTap(self, block, receive, detach)

    def projections(self, attention: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Of queries, keys and values."""
        return attention.q_proj, attention.k_proj, attention.v_proj

    def given(self, args, kwargs):
        """While a model is exported transformers gives every layer an all-true mask."""
        if not torch.compiler.is_exporting() or self.bias_name is None:
            return args, kwargs
        mask = {self.bias_name: None}
        return ((None, *args[1:]), kwargs) if args else (args, {**kwargs, **mask})

    def project(self, attention, tokens, arguments):
        heads = attention.config.num_attention_heads
        queries, keys, values = (split_heads(linear(tokens), heads) for linear in self.projections(attention))
        return *self.compared(attention, queries, keys, arguments), values

    def query_and_key(self, attention):
        if type(self).project is not TransformersVit.project:  # a family that inherits from this one
            return None
        return QueryKey.of(list(self.projections(attention)[:2]), type(self).compared is TransformersVit.compared)

    @property
    def shows_attention(self):
        """In the library's own form, "eager", from which ``output_attentions=True`` takes it."""
        return self._vision_config._attn_implementation == "eager"

    def attend(self, attention, queries, keys, values, bias):
        """With its weights if the model shows them."""
        if not self.shows_attention:
            return super().attend(attention, queries, keys, values, bias)
        weights = self.maps(attention, queries, keys, bias, None)[1]
        dropped = F.dropout(weights, self.attention_dropout(attention), attention.training)
        return dropped @ values, weights

    def finish(self, attention, joined, tokens, weights=None):
        project = getattr(attention, "o_proj", None) or attention.out_proj
        return self.as_attention_output(project(joined), weights)

    def attention_dropout(self, attention) -> float:
        return getattr(attention, "attention_dropout", None) or getattr(attention, "dropout", 0.0)

    @property
    def forward(self):
        return self.model.get_image_features if self._also_reads else self.model

    @property
    def _also_reads(self) -> bool:
        """Whether the model has a text tower beside the one for images."""
        return hasattr(self.model, "get_image_features") and hasattr(self.model, "get_text_features")

    @property
    def input_name(self) -> str:
        """The keyword of the images."""
        return "pixel_values"

    def inputs(self, images):
        size, given = self.preprocessing().size, tuple(images.shape[-2:])
        takes_size = (
            "interpolate_pos_encoding" in inspect.signature(getattr(self.forward, "forward", self.forward)).parameters
        )
        symbolic = any(isinstance(side, torch.SymInt) for side in given)  # any size is to do, in an export
        resized = takes_size and (symbolic or given != size)
        return {self.input_name: images, **({"interpolate_pos_encoding": True} if resized else {})}

    def outputs(self, images):
        found = self.forward(**self.inputs(images))
        if self._also_reads:
            return {"image_embeds": found.pooler_output}
        if getattr(found, "pred_boxes", None) is not None:  # of a detector, one for each of its tokens
            return {"class_logits": found.logits, "pred_boxes": found.pred_boxes}
        for name in ("predicted_depth", "image_embeds", "heatmaps"):
            if getattr(found, name, None) is not None:
                return {name: getattr(found, name)}
        if getattr(found, "logits", None) is not None:  # of a classifier, or of every pixel
            return {"logits" if found.logits.ndim == 2 else "maps": found.logits}
        if getattr(found, "feature_maps", None) is not None:  # a backbone's, all of one shape
            return {"feature_maps": torch.stack(found.feature_maps, dim=1)}
        pooled = getattr(found, "pooler_output", None)
        tokens = found.last_hidden_state
        return {"tokens": tokens, "features": tokens[:, 0] if pooled is None else pooled}

    def tokens(self, images):
        """The last of ``last_hidden_state`` that any part of the model gives, as its vision model does after its
        norm; of a backbone for dense heads, which gives maps only, the tokens after the last layer."""
        catch = _Catch(self)
        handles = [module.register_forward_hook(catch) for module in self.model.modules()]
        try:
            self.outputs(images)
        finally:
            for handle in handles:
                handle.remove()
        whole = self.prefix + self.patches(tuple(images.shape[-2:]))
        # Some pool the patches behind their blocks.
        return next((found for found in reversed(catch.caught) if found.shape[1] == whole), catch.caught[-1])

    @property
    def _vision_config(self):
        return self.attention(self.blocks[0]).config

    def preprocessing(self) -> Preprocessing:
        return Preprocessing(size=_pair(self._vision_config.image_size), channels=self.channels)

    @property
    def channels(self) -> int:
        """Of the images; a config that does not tell means three."""
        return getattr(self._vision_config, "num_channels", 3)

    def resize(self, size: tuple[int, int]) -> None:
        """Nothing to do: these models resample their position embeddings in each forward, or cannot, which shows."""
        weight = next(self.model.parameters())
        image = weight.new_zeros(1, self.channels, *size)
        try:
            with torch.no_grad():
                self.outputs(image)
        except (ValueError, RuntimeError) as error:
            raise UsageError(
                f"{type(self.model).__name__} does not take images of {size[0]}×{size[1]}: "
                f"{gist(error)}; leave the image size out"
            ) from None

    @contextmanager
    def exporting(self) -> Iterator[None]:
        """transformers gives every exported layer an all-true mask. An attention that has no mask function
        gets none, as in an ordinary forward; registered under a name of ours, it is its own sdpa otherwise."""
        config, before = self._vision_config, self._vision_config._attn_implementation
        # Checks of values would become nodes that ONNX does not have.
        unchecked = mock.patch.dict(os.environ, TRANSFORMERS_DISABLE_TORCH_CHECK="1")
        sdpa = sys.modules["transformers"].modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]
        sys.modules["transformers"].AttentionInterface.register(UNMASKED, sdpa)
        config._attn_implementation = UNMASKED
        try:
            code = {type(module).__module__ for module in self.model.modules()}
            with unchecked, open_numbers(name for name in code if name.startswith("transformers.models.")):
                yield
        finally:
            config._attn_implementation = before

    @property
    def patch(self) -> tuple[int, int]:
        return _pair(self._vision_config.patch_size)

    def spec(self) -> dict:
        takes = inspect.signature(type(self.model).__init__).parameters
        without = POOLING in takes and getattr(self.model, "pooler", None) is None
        given = {"arguments": {POOLING: False}} if without else {}
        return {"class": _public_class(self.model), "config": self.model.config.to_dict(), **given}


def _public_class(model: nn.Module) -> str:
    """The name under which transformers exports the model's class."""
    transformers = sys.modules["transformers"]
    return next(kind.__name__ for kind in type(model).__mro__ if hasattr(transformers, kind.__name__))


def _pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


class _HeadsTap(PairTap):
    """On two projections."""

    def sources(self):
        return list(self.adapter.projections(self.attention)[:2])

    def formed(self, queries, keys):
        heads = self.attention.config.num_attention_heads
        return split_heads(queries, heads), split_heads(keys, heads)
