"""Where a model came from: enough to build its class again, without a network and without its weights."""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from tosa_convert.errors import TosaError
from tosa_convert.hosts import host_of, run
from tosa_convert.preprocessing import Preprocessing
from tosa_convert.surgery import original


class Origin(BaseModel):
    """How to find a model's weights, and how to build its class.

    Attributes:
        source: what the user typed to load it; None for a model made in Python.
        checkpoint: the weights file given beside it, if any.
        num_classes: the outputs of the head that were asked for, if any.
        library: "timm" or "transformers".
        spec: what the library needs to build the model (see :func:`build`).
        preprocessing: how its pictures are prepared.
    """

    model_config = ConfigDict(extra="forbid")

    source: str | None = None
    checkpoint: str | None = None
    num_classes: int | None = None
    library: Literal["timm", "transformers"]
    spec: dict
    preprocessing: Preprocessing


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """How a model's pictures are prepared: noted when it was loaded, or read off the model."""
    known = getattr(model, "tosa_origin", None)
    return known.preprocessing if known is not None else host_of(model).preprocessing()


def class_names(model: nn.Module) -> list[str]:
    """The names of the model's classes in label order, where it brings them; else empty."""
    known = getattr(model, "tosa_origin", None)
    spec = known.spec if known is not None else host_of(model).spec()
    labels = spec.get("config", {}).get("id2label") or {}
    in_order = [labels[key] for key in sorted(labels, key=int)]
    return list((spec.get("pretrained_cfg") or {}).get("label_names") or in_order)


def origin_of(model: nn.Module) -> Origin:
    """The origin that loading noted on the model, or what can be read off a model made in Python.

    Raises:
        TosaError: the model was made with arguments that cannot be read back.
    """
    known = getattr(model, "tosa_origin", None)
    if known is not None:
        return known
    host = host_of(model)
    origin = Origin(library=host.library, spec=host.spec(), preprocessing=host.preprocessing())
    if not _builds_again(origin, model):
        raise TosaError(
            f"{type(model).__name__} was built with arguments that cannot be read back from it, so it could not be "
            "reopened; create it with tosa_convert.load() from a name or folder and save that"
        )
    return origin


@torch.no_grad()
def _builds_again(origin: Origin, model: nn.Module) -> bool:
    """Whether the model built from its origin, with the model's weights, gives the model's output."""
    weights = {name: value for name, value in model.state_dict().items() if ".selector." not in name}
    try:
        with torch.random.fork_rng(devices=[]):
            twin = build(origin)
        twin.load_state_dict(weights, strict=True)
    except Exception:
        return False
    ours = original(model).eval().to("cpu", torch.float32)
    preprocessing = origin.preprocessing
    shape = (1, preprocessing.channels, *preprocessing.size)
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    found, wanted = (next(iter(run(each, image).values())) for each in (twin, ours))
    return torch.allclose(found, wanted, atol=1e-4, rtol=1e-4)


def build(origin: Origin) -> nn.Module:
    """The model's class with its arguments and random weights, in eval mode."""
    spec = origin.spec
    if origin.library == "timm":
        import timm

        model = timm.create_model(spec["architecture"], pretrained=False, **spec["model_args"])
        model.pretrained_cfg = spec["pretrained_cfg"]
    else:
        import transformers

        config = transformers.AutoConfig.for_model(**spec["config"])
        model = getattr(transformers, spec["class"])(config)
    return model.eval()
