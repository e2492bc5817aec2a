"""Adapters of models that hold a supported one, such as under another head."""

import functools

from tosa_convert.models.adapter import Adapter


class Overlay:
    """Over the adapter of the model inside; mixed in before its class."""

    mixed: type["Overlay"]
    inside: type[Adapter]

    def __reduce__(self):
        """Its class is made here, so it cannot be found by its name."""
        return _blank, (self.mixed, self.inside), vars(self)


def laid_over(overlay: type[Overlay], adapter: Adapter, **more) -> Adapter:
    """An adapter that is as another one but for what an overlay has in its place; ``more`` are its own attributes."""
    found = _blank(overlay, type(adapter))
    vars(found).update(vars(adapter), **more)
    return found


def _blank(overlay: type[Overlay], inside: type[Adapter]) -> Adapter:
    kind = _kind(overlay, inside)
    return kind.__new__(kind)


@functools.cache
def _kind(overlay: type[Overlay], inside: type[Adapter]) -> type[Adapter]:
    name = f"{overlay.__name__.strip('_')}{inside.__name__}"
    return type(name, (overlay, inside), {"mixed": overlay, "inside": inside})
