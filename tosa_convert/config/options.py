"""Options laid over those of a configuration."""

from tosa_convert.config.conversion import KINDS, ConvertConfig
from tosa_convert.methods import parts


def over(config: dict, options: dict) -> dict:
    """The values of a configuration with others over them. What they replace takes its options along: another score
    has no use for those of the one before."""
    given = dict(config)
    if isinstance(options.get("layers"), dict):
        given.pop("ratio", None)
    if options.get("method") is not None:
        given = {
            name: value for name, value in given.items() if name in ConvertConfig.model_fields and name not in KINDS
        }
    if any(options.get(name) is not None for name in ("method", "bypass", "layers", "schedule")):
        given.pop("segment", None)
    rescored = options.get("method") is not None or options.get("score") is not None
    # A threshold is in the units of another score. The ratio beside it is the most that it may keep, often all.
    if rescored and given.pop("threshold", None) is not None and options.get("threshold") is None:
        given.pop("ratio", None)
    for kind, base in KINDS.items():
        before = given.get(kind, ConvertConfig.model_fields[kind].default)
        if options.get(kind, before) != before:
            given.pop("method", None)
            for name in parts.find(base, before).Options.model_fields:
                given.pop(name, None)
    return {**given, **options}
