"""transformers: V-JEPA 2.

Its encoder takes videos; the predictor beside it is left as it is. An image is shown as a video that stands still.
"""

import functools

from torch import nn

from tosa_convert.base.errors import UsageError
from tosa_convert.models.adapter import Adapter
from tosa_convert.models.families.transformers_vit import TransformersVit, layer_class
from tosa_convert.models.preprocessing import Preprocessing
from tosa_convert.models.projections import split_heads
from tosa_convert.models.rotary import RotaryTap
from tosa_convert.models.subclassing import answered
from tosa_convert.models.videos import standing_still

TRANSFORMERS = ("VJEPA2Layer",)
PLACES = "position_mask"
"""What its layers call the places of the tokens that they run on."""


def find(model: nn.Module) -> Adapter | None:
    encoders = [part for name, part in model.named_modules() if type(part).__name__ == "VJEPA2Encoder"]
    known = encoders and layer_class(encoders[0].layer[0], TRANSFORMERS)
    return TransformersVjepa2(model, list(encoders[0].layer)) if known else None


class TransformersVjepa2(TransformersVit):
    """Its attention turns queries and keys by time, row and column of their tokens."""

    relative = True
    bias_name = None

    def _prefix_tokens(self, block):
        return 0

    def projections(self, attention):
        return attention.query, attention.key, attention.value

    def tap(self, block, receive, detach=True):
        return _TurnedTap(self, block, receive, detach)

    def steered(self, block):
        return [(self.attention(block), "forward")]

    def project(self, attention, tokens, arguments):
        queries, keys, values = super().project(attention, tokens, arguments)
        places = attention.get_position_ids(tokens, masks=arguments.get(PLACES))
        return *(attention.apply_rotary_embeddings(each, places) for each in (queries, keys)), values

    def call(self, block, forward, tokens, args, kwargs, places=None, sizes=None):
        others = {name: value for name, value in kwargs.items() if name != PLACES}
        attention = self.attention(block)
        with answered(attention, functools.partial(self.by_parts, attention, sizes), otherwise=True):
            return forward(block, tokens, places, **others)[0]

    def finish(self, attention, joined, tokens, weights=None):
        return self.as_attention_output(attention.proj(joined), weights)

    def given_back(self, tokens):
        return tokens, None

    def attention_dropout(self, attention):
        return attention.dropout_prob

    @property
    def patch_projection(self):
        return next(module for module in self.model.modules() if isinstance(module, nn.Conv3d))

    @property
    def input_name(self):
        return "pixel_values_videos"

    def inputs(self, images):
        given = {self.input_name: standing_still(images, self._vision_config.frames_per_clip)}
        return {**given, "skip_predictor": True} if hasattr(self.model, "predictor") else given

    @property
    def channels(self):
        return self._vision_config.in_chans

    def preprocessing(self) -> Preprocessing:
        side = self._vision_config.crop_size
        return Preprocessing(size=(side, side), channels=self.channels)

    def resize(self, size):
        """Its positions are those of one size, whatever it is given."""
        own = self.preprocessing().size
        if size != own:
            raise UsageError(f"{type(self.model).__name__} takes images of {own[0]}×{own[1]} only; leave the size out")

    def any_size(self):
        raise UsageError("positions are those of one size")

    def grid(self, size):
        return (self._vision_config.frames_per_clip // self._vision_config.tubelet_size, *super().grid(size))


class _TurnedTap(RotaryTap):
    """On the projections of queries and keys."""

    def sources(self):
        return [*self.adapter.projections(self.attention)[:2], self.attention]

    def positions_in(self, args, kwargs):
        tokens = args[0] if args else kwargs["hidden_states"]
        return self.attention.get_position_ids(tokens, masks=kwargs.get(PLACES))

    def turned(self, queries, keys, positions):
        pair = (split_heads(each, self.attention.num_attention_heads) for each in (queries, keys))
        return tuple(self.attention.apply_rotary_embeddings(each, positions) for each in pair)
