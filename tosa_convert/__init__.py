"""Make pretrained Vision Transformers token-selective: convert, distill, fine-tune, measure, export."""

from importlib import import_module
from importlib.metadata import version

__version__ = version("tosa-convert")

_HOME = {
    "BenchSettings": "measure.benchmark",
    "Bypass": "methods.bypass",
    "ConvertConfig": "config.conversion",
    "DistillSettings": "config.settings",
    "ExportSettings": "config.settings",
    "FinetuneSettings": "config.settings",
    "Schedule": "methods.schedule",
    "Score": "methods.score",
    "TosaError": "base.errors",
    "UnsupportedModelError": "base.errors",
    "UsageError": "base.errors",
    "bench": "measure.benchmark",
    "compare": "planning.comparison",
    "convert": "selective.conversion",
    "distill": "training.distillation",
    "evaluate": "measure.evaluation",
    "export_onnx": "export.onnx",
    "finetune": "training.finetuning",
    "find_plan": "planning.api",
    "flops": "measure.macs",
    "load": "runs.loading",
    "original": "selective.conversion",
    "plan": "planning.api",
    "random_control": "measure.evaluation",
    "save": "runs.folder",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    """Verbs are imported when first used: ``tosa-convert --help`` need not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'tosa_convert' has no attribute {name!r}")
    value = getattr(import_module(f"tosa_convert.{_HOME[name]}"), name)
    globals()[name] = value
    return value
