"""Why a model cannot be made token-selective, said of the models that no family finds."""

from torch import nn

REASONS = {
    "its attention runs within windows: a token cannot leave one without changing the others": (
        "swin_transformer swin_transformer_v2 swin_transformer_v2_cr maxxvit vision_transformer_sam gcvit davit "
        "tiny_vit nest hiera hieradet_sam2"
    ),
    "it is hierarchical: its stages pool tokens or mix them with convolutions, so they have no fixed places": (
        "mvitv2 levit pvt_v2 twins coat efficientformer efficientformer_v2 efficientvit_mit efficientvit_msra edgenext "
        "mobilevit fastvit nextvit visformer pit volo"
    ),
    "its attention runs over channels, not tokens: there is no token map to predict": "xcit",
    "its blocks hold more than one set of tokens": "crossvit tnt",
    "its attention blends in maps of its own that QKᵀ does not show": "convit",
    "its attention carries positions or biases per token, which this version does not gather yet": (
        "beit vision_transformer_relpos naflexvit"
    ),
    "its class token joins after the blocks, a layout this version does not read yet": "cait",
}
NOT_A_VIT = "it has no row of transformer blocks over tokens (not a ViT)"
REFUSED = {module: reason for reason, modules in REASONS.items() for module in modules.split()}
"""timm module → why its models cannot be converted."""


def why_not(model: nn.Module, layers: list[str]) -> str:
    """One line on why no family finds this model.

    Args:
        layers: the classes of transformers' layers that are understood.
    """
    name, module = type(model).__name__, type(model).__module__
    if module.startswith("timm."):
        return f"{name} cannot be made token-selective: {_timm_reason(model, module.rsplit('.', 1)[-1])}"
    if module.startswith("transformers."):
        return (
            f"{name} (model type {model.config.model_type!r}) cannot be made token-selective: this version found no "
            f"row of layers that it understands in it; understood are {', '.join(layers)}"
        )
    return (
        f"{module}.{name} is not a Vision Transformer that this version understands, so it is left as it is; "
        "`tosa-convert models` lists what is supported"
    )


def _timm_reason(model: nn.Module, module: str) -> str:
    if module in REFUSED:
        return REFUSED[module]
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, (nn.Sequential, nn.ModuleList)) and len(blocks) and hasattr(blocks[0], "norm1"):
        return not_understood("blocks.0", blocks[0])
    return NOT_A_VIT


def not_understood(path: str, block: nn.Module) -> str:
    attention = getattr(block, "attn", None)
    inside = "" if attention is None else f" with {type(attention).__name__}"
    return f"{path} is a {type(block).__name__}{inside}, which this version does not understand yet"
