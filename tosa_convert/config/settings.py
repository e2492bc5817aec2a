"""The typed settings of training and export. A recipe holds them; the commands' options set them."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class TrainSettings(BaseModel):
    """What both training stages share.

    Attributes:
        steps: optimiser steps; or give epochs.
        epochs: passes over the training images, in place of steps.
        batch_size: images per process and forward pass.
        accumulate: forward passes per optimiser step.
        lr: peak learning rate, after a linear warm-up, before a cosine to zero.
        warmup: share of the steps that warm up.
        weight_decay: AdamW's, on matrices only.
        clip_norm: largest gradient norm.
        augment: what training images go through: "crop" (random resized crop of at least half the
            area, mirror), "flip" (mirror only) or "none".
        precision: "no" for float32, or mixed precision.
        workers: processes that read images.
        checkpoint_minutes: how much work an interruption may cost at most.
        log_every: steps between two lines of metrics.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    steps: Annotated[int, Field(ge=1)] | None = None
    epochs: Positive | None = None
    batch_size: int = Field(default=8, ge=1)
    accumulate: int = Field(default=1, ge=1)
    lr: Positive = 1e-3
    warmup: float = Field(default=0.1, ge=0, lt=1)
    weight_decay: NotNegative = 0.0
    clip_norm: Positive = 1.0
    augment: Literal["crop", "flip", "none"] = "crop"
    precision: Literal["no", "bf16", "fp16"] = "no"
    workers: int = Field(default=0, ge=0)
    checkpoint_minutes: Positive = 5.0
    log_every: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _one_length(self) -> "TrainSettings":
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs are both given; keep one of them")
        return self

    def total_steps(self, images: int, processes: int) -> int:
        """Optimiser steps for so many training images on so many processes."""
        if self.epochs is None:
            return self.steps or self.default_steps
        return max(1, round(self.epochs * images / (self.batch_size * self.accumulate * processes)))

    @property
    def default_steps(self) -> int:
        return 100


class DistillSettings(TrainSettings):
    """Stage 1: the selectors learn to predict the next layer's attention (ToSA, section 3).

    Attributes:
        kl: "forward" learns from KL(real ‖ predicted), what torch's kl_div computes from a selector's
            log-softmax; "reverse" from KL(predicted ‖ real), the paper's formula read literally. Forward
            selects more of the tokens that the real attention would (benchmarks/selector_training.py).
    """

    lr: Positive = 2e-2
    kl: Literal["forward", "reverse"] = "forward"


class FinetuneSettings(TrainSettings):
    """Stage 2: the model learns to work with its layers selective; the selectors are frozen.

    Attributes:
        labels: weight of the cross-entropy with the labels. None: 1 if there are labels, else 0.
        logits: weight of KL to the original model's logits. None: 0 if there are labels, else 1
            for models with a head.
        features: weight of the distance to the original model's last tokens. None: 0 if there are
            labels, else 1.
        cut: weight of IdleViT's token cut loss. None: 1 with method idle, else 0.
        consistency: weight of MCTF's consistency of passes with more and with fewer tokens. None: 1 with method mctf
            or mctf_fast, else 0.
        label_smoothing: of the cross-entropy.
        temperature: of the logits in the KL.
    """

    lr: Positive = 1e-4
    weight_decay: NotNegative = 0.01
    labels: NotNegative | None = None
    logits: NotNegative | None = None
    features: NotNegative | None = None
    cut: NotNegative | None = None
    consistency: NotNegative | None = None
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    temperature: Positive = 1.0


class ExportSettings(BaseModel):
    """The ONNX file and its check.

    Attributes:
        opset: ONNX operator set.
        threshold: agreement of torch and ONNX Runtime below which the export fails.
        images: most images in the check.
        labels: False ignores the names of sub-folders: they are not classes.
        any_size: the file takes images of any size that is cut into whole patches, as the model has to.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    opset: int = Field(default=20, ge=18)
    threshold: float = Field(default=0.99, ge=0, le=1)
    images: int = Field(default=512, ge=1)
    labels: bool = True
    any_size: bool = False
