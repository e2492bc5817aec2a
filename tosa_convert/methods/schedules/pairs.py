"""ToSA's schedule (arXiv 2406.08816, section 4): every second layer, each at the same ratio."""

from tosa_convert.methods.schedule import Schedule


class Pairs(Schedule):
    """Every second layer from 2 to depth − 2."""

    def layers(self, depth, first):
        return list(range(2, depth - 1, 2))
