"""EViT, token reorganisation (arXiv 2202.07800, sections 3.1 and 3.2)."""

from tosa_convert.methods.method import Method

METHOD = Method(score="class_attention", bypass="fuse", schedule="stages")
