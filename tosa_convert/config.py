"""The options of a conversion, typed and JSON-able."""

import itertools
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from tosa_convert.errors import UsageError
from tosa_convert.methods import METHODS, schedule_layers, schedule_ratios


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


Score = Literal["attention", "class_attention", "similarity", "norm", "random"]
Bypass = Literal["identity", "borrow", "merge", "drop", "fuse", "persist"]
Schedule = Literal["pairs", "all", "ramp", "stages"]
LASTING = ("drop", "fuse", "persist")
"""Bypasses behind which a model has fewer tokens."""


class ConvertConfig(BaseModel):
    """What :func:`tosa_convert.convert` does to a model.

    Attributes:
        method: a published method by name, which sets score, bypass and schedule: "tosa" (the default
            of all three), "tome", "idle", "evit", or "random", the control.
        layers: the selective layers, counted from 1, or {layer: ratio}. None: the schedule's.
        ratio: share of the patch tokens that attend in a selective layer, one number or one per layer.
            Under a lasting bypass: share of the image's patch tokens that are left behind the layer.
        score: who chooses them. "attention" is ToSA's learned selector, "class_attention" takes the
            tokens that the class token looks at, "similarity" skips those that another one can stand
            in for, "norm" takes those with the longest keys, "random" is the control.
        bypass: what the others get. "identity": nothing (ToSA); "borrow": the update of their most
            similar attended token; "merge": they are averaged into it before the layer and get its
            update; all tokens leave such a layer, in order. Lasting, between attention and MLP: "drop":
            they are gone (classification only); "fuse": they become one token (EViT); "persist": they are merged
            into their partner for good (ToMe). Behind the last layer fused and merged tokens are put back.
        schedule: "pairs" (every second layer), "all", "ramp" (falling evenly, ``ratio`` is the mean) or
            "stages" (ρ, ρ², ρ³ over the last three quarters of the layers).
        selection: "shared" lets one token set run the whole layer, attention and MLP, which is what
            saves work; "per_head" is the paper's Eq. 4: each head attends over its own tokens.
        rows: query rows from which ToSA's selector scores the tokens; the class token's is always one of
            them. "all" is the paper's computation and reads the whole L×L map. The default keeps within two
            points of its overlap with the real attention's choice (benchmarks/rows_overlap.py).
        hidden: channels of the selector's hidden layer; None means two per head.
        kernel: width of the selector's convolutions along the keys, odd.
        seed: of the selectors' initial weights and of the random control.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    method: Literal["tosa", "tome", "idle", "evit", "random"] | None = None
    layers: list[int] | None = None
    ratio: Annotated[float | list[float], BeforeValidator(_keep_ratio)] = 0.8
    score: Score = "attention"
    bypass: Bypass = "identity"
    schedule: Schedule = "pairs"
    selection: Literal["shared", "per_head"] = "shared"
    rows: Annotated[int | Literal["all"], BeforeValidator(_query_rows)] = 32
    hidden: int | None = Field(default=None, ge=1)
    kernel: int = Field(default=3, ge=1)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _method_sets_its_parts(cls, values: Any) -> Any:
        row = METHODS.get(values.get("method")) if isinstance(values, dict) else None
        for name, part in (row or {}).items():
            if values.get(name, part) != part:
                raise ValueError(
                    f"method {values['method']!r} has {name} {part!r}, not {values[name]!r}; leave out one of the two"
                )
        return {**values, **row} if row else values

    @model_validator(mode="before")
    @classmethod
    def _ratios_by_layer(cls, values: Any) -> Any:
        """``layers: {3: 0.9, 5: 0.7}`` names layers and ratios in one."""
        if not isinstance(values, dict) or not isinstance(values.get("layers"), dict):
            return values
        if "ratio" in values:
            raise ValueError("layers names a ratio for each layer already; leave ratio out")
        pairs = sorted(values["layers"].items(), key=lambda pair: (str(type(pair[0])), pair[0]))
        return {**values, "layers": [layer for layer, _ in pairs], "ratio": [ratio for _, ratio in pairs]}

    @field_validator("kernel")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("must be odd, so that the output keeps the number of keys")
        return value

    @field_validator("layers")
    @classmethod
    def _apart(cls, layers: list[int] | None) -> list[int] | None:
        if layers is None:
            return None
        if not layers:
            raise ValueError("name at least one selective layer, for example 2,4,6")
        ordered = sorted(layers)
        if ordered[0] < 1:
            raise ValueError(f"layer {ordered[0]} does not exist: layers are counted from 1")
        for lower, upper in itertools.pairwise(ordered):
            if lower == upper:
                raise ValueError(f"layer {lower} is listed twice; name each layer once")
        return layers

    @model_validator(mode="after")
    def _one_ratio_each(self) -> "ConvertConfig":
        if isinstance(self.ratio, list) and self.layers is not None and len(self.ratio) != len(self.layers):
            raise ValueError(
                f"{len(self.ratio)} ratios for {len(self.layers)} selective layers; give one, or one per layer"
            )
        return self

    @model_validator(mode="after")
    def _fit_together(self) -> "ConvertConfig":
        if self.bypass == "fuse" and self.score != "class_attention":
            raise ValueError("bypass fuse weighs tokens by the class token's attention: use score class_attention")
        if self.selection == "per_head" and (self.score not in ("attention", "random") or self.bypass != "identity"):
            raise ValueError("selection per_head is ToSA's Eq. 4, for score attention or random and bypass identity")
        if self.layers is not None:
            self._check_listening(self.layers)
        return self

    @property
    def lasting(self) -> bool:
        """Whether the layers behind a selective one have fewer tokens."""
        return self.bypass in LASTING

    @property
    def listens_before(self) -> bool:
        """Whether the score is read in the layer before the selective one."""
        return self.score == "attention" or (self.score != "similarity" and not self.lasting)

    def _check_listening(self, layers: list[int]) -> None:
        """Where a layer is read, there must be one; ToSA's selector was taught by an ordinary one."""
        if self.listens_before and min(layers) == 1:
            raise ValueError("layer 1 cannot be selective: there is no layer before it to listen to; start at 2")
        if self.score == "attention" or self.selection == "per_head":
            for lower, upper in itertools.pairwise(sorted(layers)):
                if lower + 1 == upper:
                    raise ValueError(
                        f"layers {lower} and {upper} are neighbours: layer {upper} listens to layer {lower}, which "
                        "must be ordinary; leave one layer between selective layers, or use another score"
                    )

    def plan(self, depth: int) -> list[tuple[int, float]]:
        """(layer, keep ratio) of each selective layer of a model with ``depth`` layers, in order.

        Raises:
            ValueError: a layer beyond the depth, as many ratios as there are not layers, or ratios
                that this bypass cannot do.
        """
        layers = (
            schedule_layers(self.schedule, depth, 2 if self.listens_before else 1)
            if self.layers is None
            else self.layers
        )
        if not layers:
            raise ValueError(f"schedule {self.schedule} finds no layer in a model of {depth}; name layers yourself")
        if max(layers) > depth:
            raise ValueError(f"layer {max(layers)} does not exist: the model has layers 1 to {depth}")
        self._check_listening(layers)
        if not isinstance(self.ratio, list):
            ratios = schedule_ratios(self.schedule, self.ratio, len(layers), self.lasting)
            return list(zip(sorted(layers), ratios, strict=True))
        if len(self.ratio) != len(layers):
            raise ValueError(f"{len(self.ratio)} ratios for {len(layers)} selective layers; give one, or one per layer")
        return sorted(zip(layers, self.ratio, strict=True))

    def stages(self, depth: int) -> list[tuple[int, float]]:
        """:meth:`plan`, and under a lasting bypass every layer behind the first too, with what is left there.

        Raises:
            ValueError: as :meth:`plan`; tokens that come back, or more gone in one layer than can be.
        """
        plan = self.plan(depth)
        if not self.lasting:
            return plan
        for (_, before), (layer, ratio) in itertools.pairwise([(0, 1.0), *plan]):
            if ratio > before:
                raise ValueError(f"layer {layer}: with bypass {self.bypass} tokens do not come back; ratios only fall")
            if self.score == "similarity" and ratio < before / 2:
                raise ValueError(f"layer {layer}: a matching of two halves skips at most half of the tokens at once")
        known, left = dict(plan), 1.0
        return [(layer, left := known.get(layer, left)) for layer in range(plan[0][0], depth + 1)]


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
