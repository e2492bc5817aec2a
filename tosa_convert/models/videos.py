"""Models of videos, shown images."""

import torch


def standing_still(images: torch.Tensor, frames: int) -> torch.Tensor:
    """Images (B, C, H, W) as videos (B, T, C, H, W) of so many frames; videos as they are."""
    return images if images.ndim == 5 else images[:, None].expand(-1, frames, -1, -1, -1)
