"""The options of a conversion, typed and JSON-able."""

import contextlib
import itertools
import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from tosa_convert.config.fit import check_parts, of_before
from tosa_convert.config.segments import check_same, in_segments
from tosa_convert.methods import parts
from tosa_convert.methods.bypass import Bypass
from tosa_convert.methods.method import published
from tosa_convert.methods.schedule import Schedule
from tosa_convert.methods.score import Acts, Score

KINDS: dict[str, type[parts.Part]] = {kind.kind: kind for kind in (Score, Bypass, Schedule)}
SMALLEST_RATIO_STEP = 0.5
"""Share of the tokens that a matching of two halves can take away at once."""


def _keep_ratio(value: Any) -> float | list[float]:
    """One number in (0, 1], or a list of them; one message whatever is wrong."""
    ratios = value if isinstance(value, list) else [value]
    for ratio in ratios:
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
            raise ValueError(f"{ratio!r} is not a number; a keep ratio is above 0 and at most 1, such as 0.8")
        if not 0 < ratio <= 1:
            raise ValueError(f"{ratio} is out of range; a keep ratio is above 0 and at most 1, such as 0.8")
    return value


class ConvertConfig(BaseModel):
    """What :func:`tosa_convert.convert` does to a model.

    Besides the fields below it holds the options of its score, bypass and schedule, flat and under their own names,
    such as ``rows`` with score "attention"; each part's file says what it has (:mod:`tosa_convert.methods`).

    Attributes:
        method: a published method by name, which sets score, bypass and schedule: "tosa" (the default of all three),
            "tome", "pitome", "mpm", "mctf", "mctf_fast", "frequency", "idle", "evit", "spa", "impact", or "random".
        layers: the selective layers, counted from 1, or {layer: ratio}. None: the schedule's.
        ratio: share of the patch tokens that attend in a selective layer, one number or one per layer.
            With a bypass between attention and MLP: share of the image's patch tokens that are left after the layer.
        threshold: in place of a number of tokens: those attend whose score is at least this, one number or one per
            layer, so that every image keeps as many as it needs. ``ratio`` is then the most that attend, 1 unless it
            is given. With bypasses around a block.
        score: which tokens attend. "attention" is ToSA's learned selector, "class_attention" takes the
            tokens that the class token looks at, "class_query" those that it will look at in the layer itself,
            "similarity" skips those that another one can stand in for, "mutual" one of each pair that are most like
            each other, "energy" those with much company, "norm" takes those with the longest keys, "received" those
            with the most attention, "multi_criteria" is MCTF's, "gate" SPA's, "impact" DL-ViT's, "random" the control.
        bypass: what the others get. "identity": nothing (ToSA); "borrow": the update of their most similar attended
            token; "merge": they are averaged into it before the layer and get its update; all tokens leave such a
            layer, in order. Between attention and MLP: "drop": they are removed; "fuse": they become one token (EViT),
            "local_mean": one for each window of the image; "persist": they stay merged into their partner (ToMe),
            "average": the same without weights (MPM). Before the layer: "pool": they are fused, as is its attention
            (MCTF). Fused and merged tokens come back after the last layer.
        schedule: "pairs" (every second layer), "all", "ramp" (falling evenly, ``ratio`` is the mean),
            "geometric" (PiToMe), "constant" (MCTF), "once" (MPM), "later" (the second half),
            "throughout" (one choice for all layers) or "stages" (ρ, ρ², ρ³ over the last three quarters of the layers).
        segment: how many selective layers in a row share one choice: 1, another number, or a list with the number of
            each segment, in order. The first layer chooses, and its groups run the others too, which saves choosing
            again. For bypasses after which every token is present: identity, borrow and merge.
        seed: of the selectors' initial weights and of the random control.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    method: str | None = None
    layers: list[int] | None = None
    ratio: Annotated[float | list[float], BeforeValidator(_keep_ratio)] = 0.8
    threshold: float | list[float] | None = None
    score: str = "attention"
    bypass: str = "identity"
    schedule: str = "pairs"
    segment: int | list[int] = 1
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _method_sets_its_parts(cls, values: Any) -> Any:
        values = of_before(values)
        if (name := values.get("method") if isinstance(values, dict) else None) is None:
            return values
        known = published()
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"there is no method {name!r}; choose from {', '.join(known)}")
        row = known[name].parts
        for kind, part in row.items():
            if not known[name].admits(kind, values.get(kind, part)):
                raise ValueError(f"method {name!r} has {kind} {part!r}, not {values[kind]!r}; leave out one of the two")
        return {**row, **values}

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

    @model_validator(mode="before")
    @classmethod
    def _no_most_unless_asked(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if values.get("threshold") is None:
            own = _own_threshold(values)
            if own is None or values.get("ratio") is not None or isinstance(values.get("layers"), dict):
                return values
            values = {**values, "threshold": own}
        values = values if "ratio" in values or isinstance(values.get("layers"), dict) else {**values, "ratio": 1.0}
        each = values["threshold"] if isinstance(values["threshold"], list) else [values["threshold"]]
        each = [float(value) if isinstance(value, int) and not isinstance(value, bool) else value for value in each]
        return {**values, "threshold": each if isinstance(values["threshold"], list) else each[0]}

    @field_validator("threshold")
    @classmethod
    def _finite(cls, threshold: float | list[float] | None) -> float | list[float] | None:
        each = threshold if isinstance(threshold, list) else [threshold]
        if any(value is not None and not math.isfinite(value) for value in each):
            raise ValueError(f"{threshold} is out of range; a threshold is a finite number in the units of the score")
        return threshold

    @field_validator("score", "bypass", "schedule")
    @classmethod
    def _known(cls, name: str, info: Any) -> str:
        parts.find(KINDS[info.field_name], name)
        return name

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

    @field_validator("segment")
    @classmethod
    def _at_least_one_layer(cls, segment: int | list[int]) -> int | list[int]:
        if not segment or min(segment if isinstance(segment, list) else [segment]) < 1:
            raise ValueError(f"{segment} is out of range; a segment has 1 layer or more, such as 3, or 2,3,3 for three")
        return segment

    @model_validator(mode="after")
    def _one_ratio_each(self) -> "ConvertConfig":
        if isinstance(self.ratio, list) and self.layers is not None and len(self.ratio) != len(self.layers):
            raise ValueError(
                f"{len(self.ratio)} ratios for {len(self.layers)} selective layers; give one, or one per layer"
            )
        if isinstance(self.threshold, list) and len(self.threshold) != len(self.layers or []):
            those = f"{len(self.layers)} selective layers" if self.layers else "layers that are not named"
            raise ValueError(
                f"{len(self.threshold)} thresholds for {those}; give one, or name the layers, one for each"
            )
        return self

    @model_validator(mode="after")
    def _each_part_has_its_own_options(self) -> "ConvertConfig":
        """Those given are checked, those left out get their defaults."""
        extra, known = dict(self.__pydantic_extra__ or {}), dict[str, Any]()
        for kind in KINDS.values():
            fields = self.part(kind).Options.model_fields
            given = {name: extra.pop(name) for name in fields if name in extra}
            try:
                known |= self.part(kind).Options(**given).model_dump()
            except ValidationError as error:
                item = error.errors()[0]
                name = f"{item['loc'][0]}: " if item["loc"] else ""
                raise ValueError(f"{name}{item['msg'].removeprefix('Value error, ')}") from None
        if extra:
            unknown = unknown_options(self.model_dump())
            raise ValueError("; ".join(f"{name}: {message}" for name, message in unknown.items()))
        self.__pydantic_extra__ = {**(self.__pydantic_extra__ or {}), **known}
        return self

    @model_validator(mode="after")
    def _one_number_of_tokens(self) -> "ConvertConfig":
        if "ratio" in self.model_fields_set and (self.__pydantic_extra__ or {}).get("r") is not None:
            raise ValueError("r and ratio both say how many tokens are gone; leave out one of the two")
        return self

    @model_validator(mode="after")
    def _fit_together(self) -> "ConvertConfig":
        check_parts(self)
        if self.layers is not None:
            self._check_reading(self.layers)
        return self

    def part(self, kind: type[parts.P]) -> type[parts.P]:
        """The class of its Score, Bypass or Schedule."""
        return parts.find(kind, getattr(self, kind.kind))

    def make(self, kind: type[parts.P]) -> parts.P:
        """Its score, bypass or schedule, with the options that it has."""
        part = self.part(kind)
        return part(
            **{
                name: value
                for name, value in (self.__pydantic_extra__ or {}).items()
                if name in part.Options.model_fields
            }
        )

    @property
    def acts(self) -> Acts:
        """Where its bypass acts: around a block; or before it, or between its attention and MLP, so that later layers
        have fewer tokens."""
        return self.part(Bypass).acts

    @property
    def reduces(self) -> bool:
        """Whether the layers after a selective one have fewer tokens."""
        return self.acts is not Acts.AROUND

    @property
    def reads_before(self) -> bool:
        """Whether the score is read in the layer before the selective one."""
        return self.part(Score).reads_before(self.acts)

    def _check_reading(self, layers: list[int]) -> None:
        """Where a layer is read, there must be one; ToSA's selector was taught by an ordinary one."""
        if self.reads_before and min(layers) == 1:
            raise ValueError("layer 1 cannot be selective: there is no layer before it to read; start at 2")
        if self.part(Score).ordinary_before or self.make(Bypass).per_head:
            choosing = {segment[0] for segment in self.segments(layers)}
            for lower, upper in itertools.pairwise(sorted(layers)):
                if lower + 1 == upper and upper in choosing:
                    raise ValueError(
                        f"layers {lower} and {upper} are neighbours: layer {upper} reads layer {lower}, which "
                        "must be ordinary; leave one layer between selective layers, or use another score"
                    )

    def plan(self, depth: int, patches: int = 0) -> list[tuple[int, float]]:
        """(layer, keep ratio) of each selective layer of a model with ``depth`` layers, in order.

        Args:
            patches: patch tokens of the model's own images; 0 if they are not known, for schedules that do not count.

        Raises:
            ValueError: a layer beyond the depth, as many ratios as there are not layers, ratios that this bypass
                cannot do, or several ratios or thresholds for layers that share one choice.
        """
        schedule = self.make(Schedule)
        layers = schedule.layers(depth, 2 if self.reads_before else 1) if self.layers is None else self.layers
        if not layers:
            raise ValueError(f"schedule {self.schedule} finds no layer in a model of {depth}; name layers yourself")
        if max(layers) > depth:
            raise ValueError(f"layer {max(layers)} does not exist: the model has layers 1 to {depth}")
        self._check_reading(layers)
        if isinstance(self.threshold, list):
            check_same("threshold", self.segments(layers), self.thresholds(layers))
        if not isinstance(self.ratio, list):
            ratios = schedule.ratios_of(self.ratio, len(layers), self.acts, patches)
            return self._evened(dict(zip(sorted(layers), ratios, strict=True)))
        if len(self.ratio) != len(layers):
            raise ValueError(f"{len(self.ratio)} ratios for {len(layers)} selective layers; give one, or one per layer")
        given = dict(sorted(zip(layers, self.ratio, strict=True)))
        check_same("ratio", self.segments(layers), given)
        return list(given.items())

    def _evened(self, ratios: dict[int, float]) -> list[tuple[int, float]]:
        """A schedule's ratios with their mean in each segment."""
        means = {
            layer: sum(ratios[each] for each in segment) / len(segment)
            for segment in self.segments(list(ratios))
            for layer in segment
        }
        return [(layer, round(mean, 6)) for layer, mean in means.items()]

    def thresholds(self, layers: list[int]) -> dict[int, float | None]:
        """Layer → its threshold, of these layers."""
        if not isinstance(self.threshold, list):
            return dict.fromkeys(layers, self.threshold)
        return dict(zip(self.layers or layers, self.threshold, strict=True))

    def segments(self, layers: list[int]) -> list[list[int]]:
        """These layers, in order, by segments; see :func:`tosa_convert.config.segments.in_segments`."""
        longest = len(layers) if self.segment == 1 and self.part(Schedule).whole else self.segment
        return in_segments(layers, longest)

    def stages(self, depth: int, patches: int = 0) -> list[tuple[int, float]]:
        """:meth:`plan`; and where tokens are gone after a layer, every layer after the first selective one too, with
        what is left there.

        Raises:
            ValueError: as :meth:`plan`; tokens that come back, or more gone in one layer than can be.
        """
        plan = self.plan(depth, patches)
        if not self.reduces:
            return plan
        for (_, before), (layer, ratio) in itertools.pairwise([(0, 1.0), *plan]):
            if ratio > before:
                raise ValueError(f"layer {layer}: with bypass {self.bypass} tokens do not come back; ratios only fall")
            if self.part(Score).half_at_most and ratio < before * SMALLEST_RATIO_STEP:
                raise ValueError(f"layer {layer}: a matching of two halves skips at most half of the tokens; take less")
        known, left = dict(plan), 1.0
        return [(layer, left := known.get(layer, left)) for layer in range(plan[0][0], depth + 1)]


def _own_threshold(values: dict) -> float | None:
    """What tokens have to reach by the score that these values name, if it has such a number."""
    row = published().get(str(values.get("method")))
    name = row.score if row else values.get("score", ConvertConfig.model_fields["score"].default)
    with contextlib.suppress(ValueError):  # an unknown score is reported elsewhere
        return parts.find(Score, str(name)).own_threshold
    return None


def unknown_options(values: dict) -> dict[str, str]:
    """The options among a configuration's values that neither it nor its parts have → what to do about each."""
    row = published().get(str(values.get("method")))
    named = {
        **{kind: ConvertConfig.model_fields[kind].default for kind in KINDS},
        **values,
        **(row.parts if row else {}),
    }
    known = list(ConvertConfig.model_fields)
    for kind, base in KINDS.items():
        with contextlib.suppress(ValueError):  # an unknown part is reported elsewhere
            known += parts.find(base, str(named[kind])).Options.model_fields
    return {str(name): _unknown(str(name), known) for name in values if name not in known}


def _unknown(name: str, known: list[str]) -> str:
    owners = [
        f"{kind} {part}"
        for kind, base in KINDS.items()
        for part, found in parts.every(base).items()
        if name in found.Options.model_fields
    ]
    if owners:
        return f"an option of {' and '.join(owners)}, which this conversion does not use; leave it out"
    return f"unknown key; {parts.near(name, known) or 'valid here: ' + ', '.join(known)}"
