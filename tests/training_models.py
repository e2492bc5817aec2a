"""The quickstart's model, converted, as training sees it."""

from tosa_convert import convert, load

OPTIONS = {"layers": [2, 4, 6], "ratio": 0.5}


def converted(**options):
    return convert(load("quickstart"), **{**OPTIONS, **options})
