"""Images with a mask each in folders side by side."""

import numpy as np

from tosa_convert.data.maps import read_map
from tosa_convert.data.pairs import PairReader

UNKNOWN = 255


class Masks(PairReader):
    """``images/`` and ``masks/`` with files of the same names: for every pixel the number of its class, 255 where it is
    not known. Where there are only two values, of which one is 0, the other one is the mask."""

    example = "masks:ROOT"
    folder = maps = "masks"

    def map(self, index):
        found = read_map(self.pairs[index][1]).astype(np.float32)
        values = np.unique(found)
        if len(values) <= 2 and values.min() == 0 and values.max() not in (0, 1):
            return (found > 0).astype(np.float32)
        return np.where(found == UNKNOWN, np.float32(np.nan), found)
