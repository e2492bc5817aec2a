"""MCTF-Fast: MCTF (arXiv 2403.10030) with its drops moved into half as many layers."""

from tosa_convert.methods.method import Method

METHOD = Method(score="multi_criteria", bypass="pool", schedule="shifted", losses={"consistency": 1.0})
