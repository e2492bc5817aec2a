"""PiToMe's schedule (arXiv 2405.16148, section 3.2): each layer keeps the same share of the tokens that reach it."""

from tosa_convert.methods.schedule import Schedule


class Geometric(Schedule):
    """The ratio that is asked for is the geometric mean."""

    def ratios(self, ratio, count, acts):
        return [round(ratio ** (2 * (index + 1) / (count + 1)), 6) for index in range(count)]
