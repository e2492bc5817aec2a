"""Where a model came from, when loading did not note it."""

from typing import Any

import torch
from torch import nn

from tosa_convert.base.errors import TosaError
from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.models.provenance import Origin, build
from tosa_convert.selective.conversion import original


def origin_of(model: nn.Module) -> Origin:
    """The origin that loading noted on the model, or what can be read off a model made in Python.

    Raises:
        TosaError: the model was made with arguments that cannot be read back.
    """
    known = getattr(model, "tosa_origin", None)
    if known is not None:
        return known
    adapter = adapter_of(model)
    origin = Origin(library=adapter.library, spec=adapter.spec(), preprocessing=adapter.preprocessing())
    if not _builds_again(origin, model):
        raise TosaError(
            f"{type(model).__name__} was built with arguments that cannot be read back from it, so it could not be "
            "reopened; create it with tosa_convert.load() from a name or folder and save that"
        )
    return origin


def as_it_is(model: nn.Module) -> nn.Module:
    """A trained model without its conversion, as an original of its own: what it was made from is another one now."""
    found: Any = original(model)
    found.tosa_origin = origin_of(model).model_copy(
        update={"source": None, "checkpoint": None, "head_checkpoint": None}
    )
    return found


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
    ours = original(model).eval().cpu().float()  # not to(float32), which would make complex buffers real
    preprocessing = origin.preprocessing
    shape = (1, preprocessing.channels, *preprocessing.size)
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    found, wanted = (next(iter(run(each, image).values())) for each in (twin, ours))
    return torch.allclose(found, wanted, atol=1e-4, rtol=1e-4)
