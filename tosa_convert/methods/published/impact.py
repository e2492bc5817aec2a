"""Token impact (DL-ViT, arXiv 2305.14840): a filter in front of the first layer, learnt from what the loss does without
each token; every layer runs on the tokens that pass."""

from tosa_convert.methods.method import Method

METHOD = Method(score="impact", bypass="identity", schedule="throughout")
