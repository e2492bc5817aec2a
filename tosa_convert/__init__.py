"""Make pretrained Vision Transformers token-selective: convert, distill, fine-tune, measure, export."""

from importlib import import_module
from importlib.metadata import version

__version__ = version("tosa-convert")

_HOME = {
    "BenchSettings": "benching",
    "ConvertConfig": "config",
    "DistillSettings": "settings",
    "ExportSettings": "settings",
    "FinetuneSettings": "settings",
    "TosaError": "errors",
    "UnsupportedModelError": "errors",
    "UsageError": "errors",
    "bench": "benching",
    "compare": "comparing",
    "convert": "surgery",
    "distill": "distillation",
    "evaluate": "evaluation",
    "export_onnx": "export",
    "finetune": "finetuning",
    "find_plan": "planning",
    "flops": "macs",
    "load": "loading",
    "original": "surgery",
    "plan": "planning",
    "random_control": "evaluation",
    "save": "runs",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    """Verbs are imported when first used: ``tosa-convert --help`` need not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'tosa_convert' has no attribute {name!r}")
    value = getattr(import_module(f"tosa_convert.{_HOME[name]}"), name)
    globals()[name] = value
    return value
