"""PiToMe, Spectrum-Preserving Token Merging (arXiv 2405.16148, section 3.2)."""

from tosa_convert.methods.method import Method

METHOD = Method(score="energy", bypass="persist", schedule="geometric")
