"""MPM, Mutual Pair Merging (arXiv 2604.05718), with a number of tokens that is the ratio's rather than the image's."""

from tosa_convert.methods.method import Method

METHOD = Method(score="mutual", bypass="average", schedule="once")
