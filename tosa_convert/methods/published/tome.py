"""ToMe, Token Merging (arXiv 2210.09461, section 3)."""

from tosa_convert.methods.method import Method

METHOD = Method(score="similarity", bypass="persist", schedule="ramp")
