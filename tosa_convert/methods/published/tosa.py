"""ToSA, Token Selective Attention (arXiv 2406.08816)."""

from tosa_convert.methods.method import Method

METHOD = Method(score="attention", bypass="identity", schedule="pairs")
