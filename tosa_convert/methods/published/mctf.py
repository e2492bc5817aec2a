"""MCTF, Multi-criteria Token Fusion (arXiv 2403.10030, section 3), with its reduction consistency in fine-tuning."""

from tosa_convert.methods.method import Method

METHOD = Method(score="multi_criteria", bypass="pool", schedule="constant", losses={"consistency": 1.0})
