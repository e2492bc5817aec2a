"""One choice before the first layer, which serves all of them."""

from tosa_convert.methods.schedule import Schedule


class Throughout(Schedule):
    """Tokens that are left out are left out everywhere, as in token impact (arXiv 2305.14840)."""

    whole = True
