"""KITTI as BTS (arXiv 1907.10326) and NeWCRFs prepare it: PNG files in 1/256 metres, up to 80 metres; the model sees
the 1216×352 pixels at the bottom, centred, and is scored within Garg's crop (arXiv 1603.04992) of the whole image.

That crop is all inside of what the model sees, so that scoring the prediction pasted back into the whole image, as is
customary, comes to the same.
"""

from tosa_convert.data.list_file import ListReader

WIDTH, HEIGHT = 1216, 352
ROWS, COLUMNS = (0.40810811, 0.99189189), (0.03594771, 0.96405229)


class Kitti(ListReader):
    example = "kitti:ROOT?list=FILE"
    scale, far = 256.0, 80.0
    degrees = 1.0

    def depth_file(self, image, depth):
        """The ground truth lies under the date folder, with which the image's path begins."""
        return f"{image.split('/')[0]}/{depth}"

    def frame(self, size):
        width, height = size
        if width < WIDTH or height < HEIGHT:
            raise ValueError(f"the image is {height}×{width}, smaller than {HEIGHT}×{WIDTH}; use depth:ROOT")
        left, top = (width - WIDTH) // 2, height - HEIGHT
        return left, top, left + WIDTH, top + HEIGHT

    def scored(self, size):
        width, height = size
        return _part(ROWS, height), _part(COLUMNS, width)


def _part(shares: tuple[float, float], side: int) -> slice:
    return slice(*(int(share * side) for share in shares))
