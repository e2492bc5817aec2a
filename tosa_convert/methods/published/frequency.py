"""Frequency-aware token reduction (arXiv 2511.21477), without the weights of attention that it learns (section 3.3, Eq.
12)."""

from tosa_convert.methods.method import Method

METHOD = Method(score="received", bypass="local_mean", schedule="stages")
