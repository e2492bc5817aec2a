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
    if known is not None and _still_holds(known, model):
        return known
    adapter = adapter_of(model)
    origin = Origin(library=adapter.library, spec=adapter.spec(), preprocessing=adapter.preprocessing())
    if known is not None:  # whose images are prepared as they were
        spec = {**known.spec, **origin.spec}
        if "model_args" in spec:  # what a model does not tell of itself stays
            spec["architecture"] = known.spec["architecture"]
            spec["model_args"] = known.spec["model_args"] | spec["model_args"]
        preprocessing = known.preprocessing.at(origin.preprocessing.size)
        origin = known.model_copy(update={"spec": spec, "preprocessing": preprocessing, "num_classes": None})
    if not _builds_again(origin, model):
        way_out = (
            "create it with tosa_convert.load() from a name or folder and save that"
            if known is None
            else "it was changed after it was loaded: load it as it is to be, with num_classes= or img_size="
        )
        raise TosaError(
            f"{type(model).__name__} was built with arguments that cannot be read back from it, so it could not be "
            f"reopened; {way_out}"
        )
    return origin


def _still_holds(origin: Origin, model: nn.Module) -> bool:
    """Whether what was noted of a model when it was loaded makes a model like it: Python may have changed its head or
    its image size since."""
    noted, now = (spec.get("model_args", {}) for spec in (origin.spec, adapter_of(model).spec()))
    if any(_alike(noted[name]) != _alike(now[name]) for name in noted.keys() & now.keys()):
        return False
    try:
        with torch.device("meta"):
            twin = build(origin)
    except Exception:  # some cannot be built without memory
        return True
    shapes = {name: value.shape for name, value in original(model).state_dict().items()}
    return all(shapes.get(name) == value.shape for name, value in twin.state_dict().items())


def _alike(value: Any) -> Any:
    """One form for what JSON has as a list, and for a side of a square."""
    if isinstance(value, int) and not isinstance(value, bool):
        return [value, value]
    return list(value) if isinstance(value, (tuple, list)) else value


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
