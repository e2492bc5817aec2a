"""Where a model came from: enough to build its class again, without a network and without its weights."""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from tosa_convert.errors import TosaError
from tosa_convert.hosts import host_of
from tosa_convert.preprocessing import Preprocessing


class Origin(BaseModel):
    """How to find a model's weights, and how to build its class.

    Attributes:
        source: what the user typed to load it; None for a model made in Python.
        checkpoint: the weights file given beside it, if any.
        library: "timm" or "transformers".
        spec: what the library needs to build the model (see :func:`build`).
        preprocessing: how its pictures are prepared.
    """

    model_config = ConfigDict(extra="forbid")

    source: str | None = None
    checkpoint: str | None = None
    library: Literal["timm", "transformers"]
    spec: dict
    preprocessing: Preprocessing


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
    with torch.device("meta"):
        twin = build(origin)
    shapes = {name: tuple(value.shape) for name, value in twin.state_dict().items()}
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items() if ".selector." not in name}
    if shapes != ours:
        raise TosaError(
            f"{type(model).__name__} was built with arguments that cannot be read back from it, so it could not be "
            "reopened; create it with tosa_convert.load() from a name or folder and save that"
        )
    return origin


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
