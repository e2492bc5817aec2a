"""Images with their depth in folders side by side."""

import numpy as np

from tosa_convert.base.errors import UsageError
from tosa_convert.data.maps import read_map
from tosa_convert.data.pairs import PairReader

MILLIMETRES = 1000.0


class Depth(PairReader):
    """``images/`` and ``depth/`` with files of the same names: .npy and .pfm in metres, PNG in 1/``scale`` metres. A
    depth of 0 or less, or one that is not finite, is not known."""

    example = "depth:ROOT"
    folder = maps = "depth"
    takes = ("scale",)

    def __init__(self, place, scale=MILLIMETRES):
        try:
            self.scale = float(scale)
        except ValueError:
            self.scale = 0.0
        if not 0 < self.scale < float("inf"):
            raise UsageError(f"--depth-scale {scale} is no number above 0; give what a metre is in the PNG files")
        super().__init__(place)

    def map(self, index):
        file = self.pairs[index][1]
        found = read_map(file, deep=True).astype(np.float32)
        if file.suffix.lower() == ".png":
            found = found / self.scale
        return np.where(np.isfinite(found) & (found > 0), found, np.float32(np.nan))
