"""A disparity per pixel, up to scale and shift, as MiDaS, DPT and Depth-Anything give it: the errors of depth after
least-squares alignment of both to each image's truth, in disparity (MiDaS, arXiv 1907.01341, section 5)."""

import torch

from tosa_convert.tasks.depth import Depth, Error, errors, gives_relative, is_depth_model, per_image


class RelativeDepth(Depth):
    """Its figures are called aligned: they are not to be set beside those of models that know metres."""

    metrics = {  # noqa: RUF012
        f"aligned_{name}": metric._replace(title=f"{metric.title} (aligned)") for name, metric in Depth.metrics.items()
    }
    differences = {"map_error": Error("map error")}  # noqa: RUF012
    error_is, unit = "mean distance of the map as a share of its mean", ""
    learns, takes_heads, png_scale = False, False, None
    wants = "this model gives a disparity up to scale and shift, which is measured by depth but not trained on it"

    @classmethod
    def suits(cls, model):
        return is_depth_model(model) and gives_relative(model)

    def measure(self, output, labels):
        return per_image(aligned_errors, output, labels, tuple(self.metrics))

    def difference(self, output, original):
        return {"map_error": self.error(output, original)}

    def error(self, output, original):
        """Mean distance to the original's map, as a share of its mean, (B,)."""
        ours, theirs = output.flatten(1), original.flatten(1)
        return (ours - theirs).abs().mean(1) / theirs.abs().mean(1).clamp(min=1e-12)


def aligned_errors(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Disparities up to scale and shift, and metres, (N,) both → the errors of depth after alignment, no further than
    the furthest that is true: an aligned disparity may be 0 or less."""
    return errors(1 / aligned(found, 1 / truth).clamp(min=1 / truth.max()), truth)


def aligned(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """scale · found + shift, (N,), as near as least squares bring it to what is wanted."""
    found, wanted = found.double(), wanted.double()
    centred = found - found.mean()
    scale = (centred * (wanted - wanted.mean())).sum() / centred.square().sum().clamp(min=1e-12)
    return (scale * centred + wanted.mean()).float()
