"""What a file takes and gives: images as the model was trained on them, or as they are decoded."""

from dataclasses import dataclass

import numpy as np
import torch

from tosa_convert.models.preprocessing import Preprocessing

SIDES = ("height", "width")


@dataclass(frozen=True)
class Ports:
    """The inputs and outputs of a file beside those of its model.

    Attributes:
        raw: the file takes pixels, (B, H, W, C) uint8 of the model's size, in place of normalised images (B, C, H, W),
            and a classifier's gives probabilities in place of logits.
    """

    preprocessing: Preprocessing
    raw: bool = False

    @property
    def sides(self) -> tuple[int, int]:
        """The axes of height and width."""
        return (1, 2) if self.raw else (2, 3)

    def encoded(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, C, H, W) as the file takes them."""
        if not self.raw:
            return images
        mean, std = self._scale(images)
        return ((images * std + mean) * 255).round().clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def feed(self, images: torch.Tensor) -> dict[str, np.ndarray]:
        """The same by the name of the file's input."""
        return {"images": self.encoded(images).numpy()}

    def entering(self, images: torch.Tensor) -> torch.Tensor:
        """What the file takes → what the model takes."""
        if not self.raw:
            return images
        pixels = images.permute(0, 3, 1, 2).float() / 255
        mean, std = self._scale(pixels)
        return (pixels - mean) / std

    def leaving(self, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the model gives → what the file gives."""
        if not self.raw:
            return found
        logits = found.get("logits")
        if logits is None or logits.shape[-1] == 1:
            return found
        others = {name: value for name, value in found.items() if name != "logits"}
        return {"probabilities": logits.softmax(-1), **others}

    def shape(self, batch: int | str, sides: tuple) -> list:
        """The shape of its input."""
        channels = self.preprocessing.channels
        return [batch, *sides, channels] if self.raw else [batch, channels, *sides]

    def _scale(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation for images (B, C, H, W)."""
        mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (self.preprocessing.mean, self.preprocessing.std))
        return mean.to(images.device), std.to(images.device)
