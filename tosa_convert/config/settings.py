"""The typed settings of training and export. A recipe holds them; the commands' options set them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, field_validator, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]


class TrainSettings(BaseModel):
    """What both training stages share.

    Attributes:
        steps: optimiser steps; or give epochs.
        epochs: passes over the training images, in place of steps.
        batch_size: images per process and forward pass.
        accumulate: forward passes per optimiser step.
        lr: peak learning rate, after a linear warm-up.
        warmup: share of the steps that warm up.
        opt: optimiser, by timm's name.
        sched: how the learning rate falls after the warm-up, timm's "cosine", "tanh", "poly" (evenly) or "step" (to a
            tenth, twice).
        weight_decay: on the weights of layers only, not on norms, biases and embeddings.
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
    opt: str = "adamw"
    sched: Literal["cosine", "tanh", "poly", "step"] = "cosine"
    weight_decay: NotNegative = 0.0
    clip_norm: Positive = 1.0
    augment: Literal["crop", "flip", "none"] = "crop"
    precision: Literal["no", "bf16", "fp16"] = "no"
    workers: int = Field(default=0, ge=0)
    checkpoint_minutes: Positive = 5.0
    log_every: int = Field(default=10, ge=1)

    @field_validator("precision", mode="before")
    @classmethod
    def _no_of_yaml(cls, value: Any) -> Any:
        """YAML reads an unquoted ``no`` as false."""
        return "no" if value is False else value

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
        examples: images whose tokens are labelled by their impact, for score impact: each takes as many forward passes
            as it has patches.
    """

    lr: Positive = 2e-2
    examples: int = Field(default=256, ge=1)
    kl: Literal["forward", "reverse"] = "forward"


class FinetuneSettings(TrainSettings):
    """Stage 2: the model learns to work with its layers selective; the selectors are frozen.

    Attributes:
        labels: weight of the cross-entropy with the labels. None: 1 if there are labels, else 0.
        logits: weight of KL to the original model's logits. None: 0 if there are labels, else 1
            for models with a head.
        features: weight of the distance to the original model's last tokens. None: 0 if there are
            labels, else 1.
        maps: weight of the distance to the map of the original's head, of models that give one, such as depth. None: 0
            if there are labels, else 1.
        cut: weight of IdleViT's token cut loss. None: 1 with method idle, else 0.
        consistency: weight of MCTF's consistency of passes with more and with fewer tokens. None: 1 with method mctf
            or mctf_fast, else 0.
        gates: weight of the loss on selection labels of score gate, summed over layers. None: 0.01 with method spa,
            else 0.
        smoothing: of the labels in the cross-entropy.
        temperature: of the logits in the KL.
        scale: least and largest share of the area that augment "crop" takes.
        aa: AutoAugment, RandAugment and so on, by timm's string, such as "rand-m9-mstd0.5-inc1"; with augment "crop".
        reprob: probability of random erasing; with augment "crop".
        aug_repeats: how often each image of a pass is drawn, augmented anew each time (arXiv 1901.09335); a pass then
            sees as many times fewer images.
        mixup, cutmix: alpha of the mixing of images and labels (arXiv 1710.09412, 1905.04899); 0 for none.
        rotate: by how many degrees images with maps are turned at most, with augment "crop" and "flip". None: as is
            usual for their source, 2.5 for nyu, 1 for kitti, otherwise 0.
        head_only: the backbone stays as it is, and the new head on it alone learns.
        drop_path: rate of stochastic depth in the last layer, rising evenly from none in the first.
        layer_decay: factor of the learning rate from each layer to the one before it.
        model_ema_decay: of a moving average of the weights, which rises to it; the average is what is kept, evaluated
            and exported. None: the weights themselves are.
    """

    lr: Positive = 1e-4
    weight_decay: NotNegative = 0.01
    labels: NotNegative | None = None
    logits: NotNegative | None = None
    features: NotNegative | None = None
    maps: NotNegative | None = None
    cut: NotNegative | None = None
    consistency: NotNegative | None = None
    gates: NotNegative | None = None
    smoothing: float = Field(default=0.0, ge=0, lt=1)
    temperature: Positive = 1.0
    scale: Annotated[tuple[Share, Share], Strict(False)] = (0.5, 1.0)
    aa: str | None = None
    reprob: float = Field(default=0.0, ge=0, le=1)
    aug_repeats: int = Field(default=1, ge=1)
    mixup: NotNegative = 0.0
    cutmix: NotNegative = 0.0
    rotate: NotNegative | None = None
    head_only: bool = False
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    layer_decay: Share = 1.0
    model_ema_decay: float | None = Field(default=None, gt=0, lt=1)

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, values: Any) -> Any:
        """Recipes of the version before have another name for the smoothing."""
        if isinstance(values, dict) and "label_smoothing" in values:
            if "smoothing" in values:
                raise ValueError("smoothing and label_smoothing, its name of before, are both given; keep smoothing")
            values = {"smoothing" if name == "label_smoothing" else name: value for name, value in values.items()}
        return values

    @model_validator(mode="after")
    def _crops(self) -> "FinetuneSettings":
        if self.augment != "crop" and (self.aa or self.reprob):
            raise ValueError(f"aa and reprob go with augment crop, not {self.augment}; leave them out, or take crop")
        if self.scale[0] > self.scale[1]:
            raise ValueError("scale is the least and the largest share of the area, in this order, such as [0.08, 1.0]")
        return self

    @model_validator(mode="after")
    def _pairs(self) -> "FinetuneSettings":
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix mix pairs of images; give an even batch_size, not {self.batch_size}")
        if (self.mixup or self.cutmix) and self.labels == 0:
            raise ValueError("mixup and cutmix mix labels, and labels weigh 0; leave them out")
        if self.smoothing and self.labels == 0:
            raise ValueError("smoothing is of labels, and labels weigh 0; leave it out")
        return self


class ExportSettings(BaseModel):
    """The ONNX file and its check.

    Attributes:
        opset: ONNX operator set.
        threshold: agreement of torch and ONNX Runtime below which the export fails.
        images: most images in the check.
        labels: False ignores the names of sub-folders: they are not classes.
        any_size: the file takes images of any size that is cut into whole patches, as the model has to.
        raw_input: the file takes pixels, (B, H, W, C) uint8 of the model's size, and a classifier's gives
            probabilities.
        precision: "float32", "float16", "int8", or "auto", which tries them and keeps what is fastest here of those
            that are near enough.
        calibration: of int8, how the ranges of what is multiplied with weights are found beforehand, on images; None
            finds them in each image as it comes.
        calibration_images: how many of them.
        min_agreement: of a classifier in fewer bits, the least share of images with the same top-1 as in float32.
        min_cosine: of a model that gives tokens or an embedding, their least mean cosine.
        max_error: of a model that gives maps, their largest error, as a plan has it.
        threads: with which the speed of a file with fewer bits is measured.
        also: another runtime in which the file has to be as near to the torch model.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    opset: int = Field(default=20, ge=18)
    threshold: float = Field(default=0.99, ge=0, le=1)
    images: int = Field(default=512, ge=1)
    labels: bool = True
    any_size: bool = False
    raw_input: bool = False
    precision: Literal["float32", "float16", "int8", "auto"] = "float32"
    calibration: Literal["minmax", "percentile", "entropy"] | None = None
    calibration_images: int = Field(default=32, ge=8)
    min_agreement: float = Field(default=0.97, ge=0, le=1)
    min_cosine: float = Field(default=0.99, ge=0, le=1)
    max_error: Positive = 0.02
    threads: int = Field(default=1, ge=1)
    also: Literal["openvino"] | None = None

    @model_validator(mode="after")
    def _calibrates(self) -> "ExportSettings":
        if self.calibration is not None and self.precision not in ("int8", "auto"):
            raise ValueError(f"calibration is for precision int8, not {self.precision}; leave one of them out")
        return self
