"""How an image becomes the tensor that a model was trained on."""

from pydantic import BaseModel, ConfigDict, model_validator

from tosa_convert.base.errors import UsageError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Preprocessing(BaseModel):
    """Resize, crop, scale to 0…1, normalise. Written beside each exported model as JSON.

    Attributes:
        size: height and width in pixels.
        channels: 3 for RGB, 1 for grey.
        mean, std: one number per channel, on pixels scaled to 0…1.
        interpolation: of the resize, "bilinear" or "bicubic" (PIL, antialiased).
        crop_pct: share of the resized image's side that the crop keeps.
        crop_mode: "center" resizes the shorter side and cuts off what stands over, "squash" resizes
            both sides, "border" resizes the longer side and pads.
    """

    model_config = ConfigDict(extra="ignore")

    size: tuple[int, int]
    channels: int = 3
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    @model_validator(mode="after")
    def _one_number_per_channel(self) -> "Preprocessing":
        """Libraries keep the numbers of three channels for a model of grey images."""
        for name in ("mean", "std"):
            given = getattr(self, name)
            if len(given) != self.channels:
                setattr(self, name, (sum(given) / len(given),) * self.channels)
        return self

    @property
    def mode(self) -> str:
        """The PIL mode of the images.

        Raises:
            UsageError: of some other number of channels.
        """
        if self.channels not in (1, 3):
            raise UsageError(f"this model takes images of {self.channels} channels; files are read with 3 or with 1")
        return "L" if self.channels == 1 else "RGB"

    def at(self, size: tuple[int, int]) -> "Preprocessing":
        """The same at another image size."""
        return self.model_copy(update={"size": size})
