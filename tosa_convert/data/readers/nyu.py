"""NYU Depth v2 as BTS (arXiv 1907.10326) and NeWCRFs prepare it: PNG files in millimetres, up to 10 metres; scored
within Eigen's crop (arXiv 1406.2283)."""

from tosa_convert.data.list_file import ListReader


class Nyu(ListReader):
    example = "nyu:ROOT?list=FILE"
    scale, far = 1000.0, 10.0
    degrees, brightness = 2.5, (0.75, 1.25)

    def scored(self, size):
        return slice(45, 471), slice(41, 601)
