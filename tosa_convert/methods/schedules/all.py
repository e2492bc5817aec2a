"""Every layer that can be selective, all at one ratio."""

from tosa_convert.methods.schedule import Schedule


class All(Schedule):
    """All layers alike."""
