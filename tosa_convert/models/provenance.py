"""Where a model came from: enough to build its class again, without a network and without its weights."""

from typing import Literal

from pydantic import BaseModel, ConfigDict
from torch import nn

from tosa_convert.config.head import HeadConfig
from tosa_convert.models.adapter import adapter_of
from tosa_convert.models.dense import with_head
from tosa_convert.models.preprocessing import Preprocessing


class Origin(BaseModel):
    """How to find a model's weights, and how to build its class.

    Attributes:
        source: what the user typed to load it; None for a model made in Python.
        checkpoint: the weights file given beside it, if any.
        num_classes: the outputs of the head that were asked for, if any.
        head_checkpoint: the weights file of a head of ours, if any; without, the head was new.
        library: "timm" or "transformers".
        spec: what the library needs to build the model (see :func:`build`), and under "head" the head of ours on it.
        preprocessing: how its images are prepared.
    """

    model_config = ConfigDict(extra="forbid")

    source: str | None = None
    checkpoint: str | None = None
    num_classes: int | None = None
    head_checkpoint: str | None = None
    library: Literal["timm", "transformers"]
    spec: dict
    preprocessing: Preprocessing


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """How a model's images are prepared: noted when it was loaded, or read off the model."""
    known = getattr(model, "tosa_origin", None)
    return known.preprocessing if known is not None else adapter_of(model).preprocessing()


def class_names(model: nn.Module) -> list[str]:
    """The names of the model's classes in label order, where it brings them; else empty."""
    known = getattr(model, "tosa_origin", None)
    spec = known.spec if known is not None else adapter_of(model).spec()
    labels = spec.get("config", {}).get("id2label") or {}
    in_order = [labels[key] for key in sorted(labels, key=int)]
    return list((spec.get("pretrained_cfg") or {}).get("label_names") or in_order)


def build(origin: Origin) -> nn.Module:
    """The model's class with its arguments and random weights, in eval mode."""
    spec = origin.spec
    if origin.library == "timm":
        import timm

        model = timm.create_model(spec["architecture"], pretrained=False, **spec["model_args"])
        model.pretrained_cfg = spec["pretrained_cfg"]
    else:
        import transformers

        kind = getattr(transformers, spec["class"])
        model = kind(kind.config_class.from_dict(dict(spec["config"])), **spec.get("arguments", {}))
    if "head" in spec:
        model = with_head(model, HeadConfig(**spec["head"]))
    return model.eval()
