"""Why a model cannot be made token-selective, said of the models that no family finds."""

import inspect

from torch import nn

from tosa_convert.models.proof.images import image_config

REASONS = {
    "its attention runs within windows: a token cannot leave one without changing the others": (
        "swin_transformer swin_transformer_v2 swin_transformer_v2_cr maxxvit gcvit davit "
        "tiny_vit nest hiera hieradet_sam2",
        "swin swinv2 swin2sr maskformer-swin donut-swin hiera sam2 "
        "sam2_vision_model sam2_hiera_det_model sam3 sam3_vit_model dinat",
    ),
    "it is hierarchical: its stages pool tokens or mix them with convolutions, so they have no fixed places": (
        "mvitv2 levit pvt_v2 twins coat efficientformer efficientformer_v2 efficientvit_mit efficientvit_msra edgenext "
        "mobilevit fastvit nextvit visformer pit volo",
        "levit pvt pvt_v2 segformer cvt focalnet mobilevit mobilevitv2 poolformer glpn",
    ),
    "it attends along times and along places in turn, never over all tokens": ("", "timesformer"),
    "its attention runs over channels, not tokens: there is no token map to predict": ("xcit", ""),
    "its blocks hold more than one set of tokens": ("crossvit tnt", ""),
    "its attention blends in maps of its own that QKᵀ does not show": ("convit", ""),
    "it wraps a model of timm: load that one by its timm name, or convert the part inside": (
        "",
        "timm_wrapper timm_backbone",
    ),
}
NOT_A_VIT = "it has no row of transformer blocks over tokens (not a ViT)"
PACKED = "it takes the patches of all images packed into one row"
NO_IMAGES = "it takes no images (a text model, perhaps)"
NO_SIZES = "its config does not say how large its images and its patches are, and without that nothing can be proven"
GRIDS = "grid_thw"
"""The argument of models that take patches of several images in a row."""
IMAGES = ("pixel", "image", "patches", "input_values", "video")
"""What the names of arguments hold that are images."""
TIMM = {module: reason for reason, (modules, _) in REASONS.items() for module in modules.split()}
"""timm's module → why its models cannot be converted."""
TRANSFORMERS = {kind: reason for reason, (_, kinds) in REASONS.items() for kind in kinds.split()}
"""transformers' model type → the same."""
ATTENTIONS = ("attn", "attention", "self_attn", "self_attention")


def why_not(model: nn.Module) -> str:
    """One line on why no family finds this model."""
    name, module = type(model).__name__, type(model).__module__
    if module.startswith("timm."):
        reason = TIMM.get(module.rsplit(".", 1)[-1])
    elif module.startswith("transformers."):
        reason = TRANSFORMERS.get(getattr(getattr(model, "config", None), "model_type", ""))
        taken = inspect.signature(model.forward).parameters
        if GRIDS in taken:
            reason = PACKED
        elif reason is None and not any(each in name for name in taken for each in IMAGES):
            reason = NO_IMAGES
        elif reason is None and image_config(model) is None and _first_seen(model):
            reason = NO_SIZES
    elif (inside := _wrapped(model)) is not None:
        return f"{name} wraps a {type(inside).__name__}; convert that one before it is wrapped"
    else:
        return (
            f"{module}.{name} is not a Vision Transformer that this version understands, so it is left as it is; "
            "`tosa-convert models` lists what is supported"
        )
    return f"{name} cannot be made token-selective: {reason or _first_seen(model) or NOT_A_VIT}"


def _wrapped(model: nn.Module) -> nn.Module | None:
    """The model of a library inside of something that compiles, distributes or adapts it."""
    outer = (child for child in model.modules() if child is not model)
    return next(
        (each for each in outer if type(each).__module__.startswith(("timm.models", "transformers.models"))), None
    )


def _first_seen(model: nn.Module) -> str | None:
    """What was not understood in a model that has a row of blocks with attention."""
    for path, row in model.named_modules():
        if isinstance(row, (nn.Sequential, nn.ModuleList)) and len(row) > 1 and _attention(row[0]) is not None:
            return not_understood(f"{path}.0", row[0])
    return None


def _attention(block: nn.Module) -> nn.Module | None:
    return next((child for name, child in block.named_children() if name in ATTENTIONS), None)


def not_understood(path: str, block: nn.Module) -> str:
    """A block of a kind that was never seen, by its class and where it stands in the model."""
    attention = _attention(block)
    inside = "" if attention is None else f" with {type(attention).__name__}"
    return (
        f"its {path} is a {type(block).__name__}{inside}, which this version does not understand; it is not converted "
        "by guess"
    )
