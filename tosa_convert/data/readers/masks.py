"""Images with a mask each in folders side by side."""

import numpy as np

from tosa_convert.data.maps import read_map
from tosa_convert.data.pairs import PairReader


class Masks(PairReader):
    """``images/`` and ``masks/`` with files of the same names: a number for every pixel, which the task makes sense
    of."""

    example = "masks:ROOT"
    folder = maps = "masks"

    def map(self, index):
        return read_map(self.pairs[index][1]).astype(np.float32)
