"""The control: ToSA's layers with tokens chosen at random."""

from tosa_convert.methods.method import Method

METHOD = Method(score="random", bypass="identity", schedule="pairs", control=True)
