"""The options of a conversion, typed and JSON-able."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Ratio = Annotated[float, Field(gt=0, le=1)]


class ConvertConfig(BaseModel):
    """What :func:`tosa_convert.convert` does to a model.

    Attributes:
        layers: the selective layers, counted from 1; layer l listens to layer l − 1. None: every
            second layer from 2 to depth − 2, the paper's setting at depth 12.
        ratio: share of the patch tokens that attend in a selective layer, one number or one per layer.
        score: who chooses them. "attention" is ToSA's learned selector, "random" the control.
        selection: "shared" lets one token set run the whole layer, attention and MLP, which is what
            saves work; "per_head" is the paper's Eq. 4: each head attends over its own tokens.
        hidden: channels of the selector's hidden layer; None means two per head.
        kernel: width of the selector's convolutions along the keys, odd.
        seed: of the selectors' initial weights and of the random control.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: list[int] | None = None
    ratio: Ratio | list[Ratio] = 0.8
    score: Literal["attention", "random"] = "attention"
    selection: Literal["shared", "per_head"] = "shared"
    hidden: int | None = Field(default=None, ge=1)
    kernel: int = Field(default=3, ge=1)
    seed: int = Field(default=0, ge=0)

    @field_validator("kernel")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("must be odd, so that the output keeps the number of keys")
        return value
