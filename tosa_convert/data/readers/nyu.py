"""NYU Depth v2 as BTS (arXiv 1907.10326) and NeWCRFs prepare it: PNG files in millimetres, up to 10 metres; scored
within Eigen's crop (arXiv 1406.2283), and learnt without the blank borders of its images."""

from tosa_convert.data.list_file import ListReader

SIZE = (640, 480)


class Nyu(ListReader):
    example = "nyu:ROOT?list=FILE"
    scale, far = 1000.0, 10.0
    degrees, brightness = 2.5, (0.75, 1.25)

    def frame(self, size):
        if size != SIZE:
            raise ValueError(f"the image is {size[1]}×{size[0]}, not 480×640; use depth:ROOT")
        return super().frame(size)

    def scored(self, size):
        return slice(45, 471), slice(41, 601)

    def learnt(self, size):
        return slice(45, 472), slice(43, 608)
