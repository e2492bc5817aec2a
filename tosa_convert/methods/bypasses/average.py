"""Mutual Pair Merging's bypass (arXiv 2604.05718): as ToMe's, but later layers do not weigh tokens by their number."""

from tosa_convert.methods.bypasses.persist import Persist


class Average(Persist):
    """Skipped tokens stay averaged into their partner, and each gets a copy after the last layer."""

    proportional = False
