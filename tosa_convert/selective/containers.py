"""Images of different numbers of tokens in containers of one length, as Select and Pack has it (arXiv 2410.23608,
section 3.3): tokens of several images lie in one container, and attend within their image alone."""

import torch

from tosa_convert.selective.row_attention import attend_in_rows


def packed_into(lengths: tuple[int, ...], size: int) -> list[list[int]]:
    """Which images share a container: the longest first, each into the first container that has room for it.

    Args:
        lengths: how many tokens there are of each image.
        size: of a container; a longer image makes all of them as long, since none is cut.
    """
    size = max(size, *lengths)
    containers: list[list[int]] = []
    room: list[int] = []
    for image in sorted(range(len(lengths)), key=lambda image: -lengths[image]):
        place = next((place for place, left in enumerate(room) if left >= lengths[image]), len(room))
        if place == len(room):
            containers.append([])
            room.append(size)
        containers[place].append(image)
        room[place] -= lengths[image]
    return containers


class Containers:
    """Where the tokens of a row lie in its containers.

    Args:
        lengths: how many tokens there are of each image, in the order of the row.
        size: of a container.
    """

    def __init__(self, lengths: tuple[int, ...], size: int, device: torch.device):
        groups, size = packed_into(lengths, size), max(size, *lengths)
        starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
        places, images = [], []
        for group in groups:
            row = [place for image in group for place in range(starts[image], starts[image + 1])]
            whose = [image for image in group for _ in range(lengths[image])]
            places.append(row + [-1] * (size - len(row)))
            images.append(whose + [-1] * (size - len(whose)))
        place, image = torch.tensor(places, device=device), torch.tensor(images, device=device)
        self.taken = place.clamp(min=0)
        """(C, L): the token of the row at each place of each container; where there is none the row's first."""
        self.same = (image[:, :, None] == image[:, None])[:, None]
        """(C, 1, L, L): who sees whom; what fills a container sees itself."""
        self.back = torch.empty(sum(lengths), dtype=torch.long, device=device)
        self.back[place[place >= 0]] = (place.flatten() >= 0).nonzero()[:, 0]

    def attend(self, query, key, value, mask: torch.Tensor | None, **options) -> torch.Tensor:
        """``scaled_dot_product_attention`` of (1, H, K, C) each, within every image.

        Args:
            mask: what is added to the logits, (1, H or 1, K or 1, K).
        """
        return attend_in_rows(query, key, value, mask, self.taken, self.same, self.back, **options)
