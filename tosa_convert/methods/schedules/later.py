"""The second half of the layers, all at one ratio or threshold."""

from tosa_convert.methods.schedule import Schedule


class Later(Schedule):
    """As SPA selects in stages 3 and 4 of a Swin (arXiv 2410.23608): to select earlier was worse there."""

    def layers(self, depth, first):
        return list(range(max(first, depth // 2 + 1), depth + 1))
