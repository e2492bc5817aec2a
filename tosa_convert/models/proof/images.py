"""What images a model of transformers takes, by its config and its signature."""

import inspect
from typing import Any

import torch
from torch import nn


def image_config(model: nn.Module) -> Any:
    """The config that says how large images and patches are; None where none does."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return next((config for config in configs if _cuts(config) and size_of(config)), None)


def _cuts(config: Any) -> bool:
    return any(getattr(config, name, None) for name in ("patch_size", "tubelet_size"))


def grid_by_config(config: Any) -> tuple[int, ...]:
    """Rows and columns of the patches."""
    cut = getattr(config, "patch_size", 1)
    cut = (cut, cut) if isinstance(cut, int) else tuple(cut)[-2:]
    return tuple(side // patch for side, patch in zip(size_of(config), cut, strict=True))


def channels_of(config: Any) -> int:
    """Of the images; a config that does not tell means three."""
    return 1 if hasattr(config, "num_mel_bins") else getattr(config, "num_channels", 3)


def forward_of(model: Any):
    """What takes images: the model, or of one of images and texts its image branch."""
    both = hasattr(model, "get_image_features") and hasattr(model, "get_text_features")
    return model.get_image_features if both else model


def input_name(model: Any) -> str:
    """The keyword of the images."""
    taken = inspect.signature(getattr(forward_of(model), "forward", forward_of(model))).parameters
    return next((name for name in ("pixel_values", "input_values") if name in taken), model.main_input_name)


def frames_of(model: nn.Module, config: Any) -> int:
    """Pictures of a video, of which a patch is cut from several at once; 0 for a model of images."""
    if not any(isinstance(module, nn.Conv3d) for module in model.modules()):
        return 0
    return getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", 0)


def as_taken(name: str, images: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) as the model takes them: a spectrogram, which is one of its frequencies and times, comes as
    (B, times, frequencies)."""
    return images[:, 0].mT if name == "input_values" else images


def size_of(config: Any) -> tuple[int, int] | None:
    """Height and width of the images, where a config tells."""
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return config.num_mel_bins, config.max_length
    size = getattr(config, "image_size", None)
    return (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (list, tuple)) else None
