"""The options of a conversion, typed and JSON-able."""

import itertools
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from tosa_convert.errors import UsageError


def _keep_ratio(value: Any) -> float | list[float]:
    """One number in (0, 1], or a list of them; one message whatever is wrong."""
    ratios = value if isinstance(value, list) else [value]
    for ratio in ratios:
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
            raise ValueError(f"{ratio!r} is not a number; a keep ratio is above 0 and at most 1, such as 0.8")
        if not 0 < ratio <= 1:
            raise ValueError(f"{ratio} is out of range; a keep ratio is above 0 and at most 1, such as 0.8")
    return value


def _query_rows(value: object) -> object:
    if value != "all" and (isinstance(value, bool) or not isinstance(value, int) or value < 2):
        raise ValueError(f"{value!r} is no number of query rows; give 2 or more, such as 32, or all")
    return value


class ConvertConfig(BaseModel):
    """What :func:`tosa_convert.convert` does to a model.

    Attributes:
        layers: the selective layers, counted from 1; layer l listens to layer l − 1. None: every
            second layer from 2 to depth − 2, the paper's setting at depth 12.
        ratio: share of the patch tokens that attend in a selective layer, one number or one per layer.
        score: who chooses them. "attention" is ToSA's learned selector, "random" the control.
        selection: "shared" lets one token set run the whole layer, attention and MLP, which is what
            saves work; "per_head" is the paper's Eq. 4: each head attends over its own tokens.
        rows: query rows from which the selector scores the tokens; the class token's is always one of them.
            "all" is the paper's computation and reads the whole L×L map. The default keeps within two
            points of its overlap with the real attention's choice (benchmarks/rows_overlap.py).
        hidden: channels of the selector's hidden layer; None means two per head.
        kernel: width of the selector's convolutions along the keys, odd.
        seed: of the selectors' initial weights and of the random control.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    layers: list[int] | None = None
    ratio: Annotated[float | list[float], BeforeValidator(_keep_ratio)] = 0.8
    score: Literal["attention", "random"] = "attention"
    selection: Literal["shared", "per_head"] = "shared"
    rows: Annotated[int | Literal["all"], BeforeValidator(_query_rows)] = 32
    hidden: int | None = Field(default=None, ge=1)
    kernel: int = Field(default=3, ge=1)
    seed: int = Field(default=0, ge=0)

    @field_validator("kernel")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("must be odd, so that the output keeps the number of keys")
        return value

    @field_validator("layers")
    @classmethod
    def _apart(cls, layers: list[int] | None) -> list[int] | None:
        """Layer l reads layer l − 1, which must be an ordinary one."""
        if layers is None:
            return None
        if not layers:
            raise ValueError("name at least one selective layer, for example 2,4,6")
        ordered = sorted(layers)
        if ordered[0] == 1:
            raise ValueError("layer 1 cannot be selective: there is no layer before it to listen to; start at 2")
        if ordered[0] < 1:
            raise ValueError(f"layer {ordered[0]} does not exist: layers are counted from 1")
        for lower, upper in itertools.pairwise(ordered):
            if lower == upper:
                raise ValueError(f"layer {lower} is listed twice; name each layer once")
            if lower + 1 == upper:
                raise ValueError(
                    f"layers {lower} and {upper} are neighbours: layer {upper} listens to layer {lower}, which must "
                    "be ordinary; leave one layer between selective layers"
                )
        return layers

    @model_validator(mode="after")
    def _one_ratio_each(self) -> "ConvertConfig":
        if isinstance(self.ratio, list) and self.layers is not None and len(self.ratio) != len(self.layers):
            raise ValueError(
                f"{len(self.ratio)} ratios for {len(self.layers)} selective layers; give one, or one per layer"
            )
        return self

    def plan(self, depth: int) -> list[tuple[int, float]]:
        """(layer, keep ratio) of each selective layer of a model with ``depth`` layers, in order.

        Raises:
            ValueError: a layer beyond the depth, or as many ratios as there are not layers.
        """
        layers = list(range(2, depth - 1, 2)) if self.layers is None else self.layers
        if not layers or max(layers) > depth:
            raise ValueError(f"layer {max(layers, default=2)} does not exist: the model has layers 1 to {depth}")
        ratios = self.ratio if isinstance(self.ratio, list) else [self.ratio] * len(layers)
        if len(ratios) != len(layers):
            raise ValueError(f"{len(ratios)} ratios for {len(layers)} selective layers; give one, or one per layer")
        return sorted(zip(layers, ratios, strict=True))


def build_config(kind: type[BaseModel], values: dict):
    """A validated ``kind``, or a UsageError that names everything wrong with the values."""
    try:
        return kind(**values)
    except ValidationError as error:
        raise UsageError("; ".join(dict.fromkeys(map(_describe, error.errors())))) from None


def _describe(item: dict) -> str:
    """One of pydantic's findings in plain words, behind the name of the option."""
    name = str(item["loc"][0]) if item["loc"] else ""
    message = item["msg"].removeprefix("Value error, ")
    return f"{name}: {message}" if name else message
