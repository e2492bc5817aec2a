"""Models of timm and transformers, from names, checkpoints and folders. Weights are read without executing code."""

import contextlib
import difflib
import warnings
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import nn

from tosa_convert.base.errors import TosaError, TosaWarning, UnsupportedModelError, UsageError, gist
from tosa_convert.base.files import read_json
from tosa_convert.base.quiet import quiet
from tosa_convert.models.adapter import adapter_of, families
from tosa_convert.models.preprocessing import Preprocessing
from tosa_convert.models.provenance import Origin

LONG_SUFFIX = "_patch*_*"
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""PIL's numbers, which transformers writes."""


def resolve_timm_name(name: str) -> str:
    """A full timm model name, from a full name or an unambiguous beginning.

    Raises:
        UsageError: unknown or ambiguous; the nearest names are listed.
    """
    base, _, tag = name.partition(".")
    if timm.is_model(base):
        return name
    found = timm.list_models(base + LONG_SUFFIX)
    if len(found) == 1:
        return found[0] + (f".{tag}" if tag else "")
    if found:
        raise UsageError(f"{name!r} is ambiguous: it could be {_listing(found)}; give the full name")
    near = timm.list_models(f"*{base}*") or _similar(base)
    hint = f"nearest are {_listing(near)}" if near else "`tosa-convert models` lists what there is"
    raise UsageError(f"no model or folder is called {name!r}; {hint}")


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of a .safetensors or .pth file; no code in it is run.

    Raises:
        TosaError: missing, truncated, not a state dict, or a pickle that wants to run code.
    """
    if not path.is_file():
        raise UsageError(f"there is no checkpoint file at {path}")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        reason = (
            "it holds more than tensors, and running its code is refused"
            if "weights_only" in str(error)
            else ("it is truncated or not a checkpoint")
        )
        raise TosaError(
            f"cannot read {path}: {reason}; get the file again, or save the state dict as .safetensors"
        ) from None
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise TosaError(f"{path} holds no state dict; save model.state_dict() and use that")
    return state


def _similar(name: str) -> list[str]:
    """timm names whose part before the patch size is spelt much like ``name``."""
    stems = {full.split("_patch")[0]: full for full in timm.list_models()}
    return [stems[stem] for stem in difflib.get_close_matches(name, stems, n=5, cutoff=0.5)]


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown + (f" … ({len(names)} in all)" if len(names) > 5 else "")


def load_timm(name: str, checkpoint: str | Path | None, num_classes: int | None, pretrained: bool) -> nn.Module:
    arguments = {} if num_classes is None else {"num_classes": num_classes}
    _refuse_before_fetching(name)
    if checkpoint is None:
        model = _create(name, pretrained, arguments, instead="download its weights elsewhere and add --checkpoint FILE")
    else:
        model = _create_with_checkpoint(name, Path(checkpoint), arguments)
    adapter = adapter_of(model)
    model.tosa_origin = Origin(library="timm", spec=adapter.spec(), preprocessing=adapter.preprocessing())
    return model


def _refuse_before_fetching(name: str) -> None:
    """A model that cannot be converted is refused before its weights are asked for."""
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False)
    except Exception:  # some cannot be built without memory; they are looked at when they are loaded
        return
    adapter_of(model)


def load_timm_folder(folder: Path, num_classes: int | None, pretrained: bool) -> nn.Module:
    config = read_json(folder / "config.json")
    weights = _weights_in(folder) if pretrained else None
    if weights is not None and weights.suffix != ".safetensors":
        read_checkpoint(weights)  # older timm would run the code in it
    arguments = dict(config.get("model_args", {}))
    if num_classes is not None:
        arguments["num_classes"] = num_classes
        _say_if_head_is_new(str(folder), config.get("num_classes", num_classes), num_classes)
    model = _create(f"local-dir:{folder}", pretrained, arguments, instead="check that the folder is complete")
    adapter = adapter_of(model)
    spec = adapter.spec()
    spec["architecture"] = config["architecture"]
    spec["model_args"] = {**spec["model_args"], **arguments}
    model.tosa_origin = Origin(library="timm", spec=spec, preprocessing=adapter.preprocessing())
    return model


def _weights_in(folder: Path) -> Path | None:
    """The file of a folder that timm opens: the first of these names, else of these endings."""
    for pattern in (
        *("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth", "open_clip_model.safetensors"),
        *(f"open_clip_pytorch_model.{ending}" for ending in ("safetensors", "bin", "pth")),
        *("*.safetensors", "*.pth", "*.pth.tar", "*.bin"),
    ):
        found = sorted(folder.glob(pattern))
        if found:
            return found[0]
    return None


def _create(name: str, pretrained: bool, arguments: dict, instead: str) -> nn.Module:
    try:
        with quiet("timm", "huggingface_hub"), _same_random_weights():
            return timm.create_model(name, pretrained=pretrained, **arguments)
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise TosaError(f"cannot load pretrained {name}: {gist(error)}; {instead}") from error


def _say_if_head_is_new(source: str, trained: int, wanted: int) -> None:
    if wanted not in (0, trained):
        has = f"one of {trained} outputs" if trained else "none"
        warnings.warn(
            f"the head of {wanted} outputs is new and untrained: {source} has {has}; fine-tune it before you trust its "
            "answers",
            TosaWarning,
            stacklevel=2,
        )


def _create_with_checkpoint(name: str, checkpoint: Path, arguments: dict) -> nn.Module:
    """timm's own filters translate foreign layouts; the head follows the checkpoint unless the user says otherwise."""
    state = read_checkpoint(checkpoint)
    head = next((state[key] for key in ("head.weight", "module.head.weight", "head.fc.weight") if key in state), None)
    outputs = 0 if head is None else len(head)
    arguments.setdefault("num_classes", outputs)
    _say_if_head_is_new(str(checkpoint), outputs, arguments["num_classes"])
    overlay = {"file": str(checkpoint), "num_classes": outputs, "custom_load": False}
    try:
        with quiet("timm"), _same_random_weights():
            return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    except Exception as error:
        raise TosaError(f"{checkpoint} does not fit {name}: {gist(error)}; check the model name") from error


def load_transformers(name: str, local: bool, pretrained: bool) -> nn.Module:
    try:
        import transformers
    except ImportError:
        raise UsageError("Hugging Face models need transformers: pip install 'tosa-convert[hf]'") from None
    try:
        transformers.utils.logging.disable_progress_bar()
        with quiet("transformers", "huggingface_hub"):
            config = transformers.AutoConfig.from_pretrained(name, local_files_only=local)
            names = [family.adapt(config) for family in families() if hasattr(family, "adapt")]
            asked = next(filter(None, names), (config.architectures or ["AutoModel"])[0])
            kind = getattr(transformers, asked, transformers.AutoModel)
            if not pretrained:
                model = kind.from_config(config) if kind is transformers.AutoModel else kind(config)
            else:
                how = {"config": config, "local_files_only": local, "dtype": torch.float32, "output_loading_info": True}
                model, found = kind.from_pretrained(name, **how)
                lacking = sorted(found["missing_keys"])
                if lacking and all(key.startswith("pooler.") for key in lacking):  # it was saved without one
                    model, found = kind.from_pretrained(name, **how, add_pooling_layer=False)
                    lacking = sorted(found["missing_keys"])
                if lacking:
                    raise ValueError(f"the weights lack {', '.join(lacking[:3])}")
    except Exception as error:
        if "weights_only" in str(error):
            raise TosaError(
                f"cannot load {name}: its weights are a pickle that holds more than tensors, and running its code is "
                "refused; save the model with safetensors"
            ) from None
        if "Unrecognized configuration class" in str(error):
            raise UnsupportedModelError(
                f"cannot load {name}: transformers loads no {config.model_type} by itself; load the whole model in "
                "Python, and convert its vision part"
            ) from None
        hint = "the folder is damaged or incomplete" if local else "download it elsewhere and give its local folder"
        raise TosaError(f"cannot load {name}: {gist(error)}; {hint}") from error
    adapter = adapter_of(model)
    preprocessing = _transformers_preprocessing(name, adapter.preprocessing())
    model.tosa_origin = Origin(library="transformers", spec=adapter.spec(), preprocessing=preprocessing)
    return model


def _transformers_preprocessing(name: str, default: Preprocessing) -> Preprocessing:
    """What preprocessor_config.json says, of a local folder or beside a model of the hub; else the default."""
    from transformers.utils import cached_file

    try:
        path = cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    except OSError:
        path = None
    if path is None:
        return default
    known = read_json(Path(path))
    found = {"interpolation": RESAMPLING.get(known.get("resample"), default.interpolation)}
    if known.get("do_normalize", True):
        found |= {
            ours: known[theirs] for ours, theirs in (("mean", "image_mean"), ("std", "image_std")) if theirs in known
        }
    else:
        found |= {"mean": (0.0,) * default.channels, "std": (1.0,) * default.channels}
    return Preprocessing(**{**default.model_dump(), **found, **_resizing(known)})


def _resizing(known: dict) -> dict:
    """How a processor of transformers resizes and crops, in our words; nothing where it does not tell.

    Older files give one number for both sides, and which sides those are only their class knows.
    """
    import transformers

    name = known.get("image_processor_type") or known.get("feature_extractor_type") or ""
    with contextlib.suppress(Exception):  # what its own class does not read, or is not here for, says what it says
        kind = getattr(transformers, name.replace("FeatureExtractor", "ImageProcessor"))
        known = kind.from_dict(dict(known)).to_dict()
    size, crop = ({} if not isinstance(each := known.get(key), dict) else each for key in ("size", "crop_size"))
    cut = crop.get("height") if known.get("do_center_crop", True) else None
    if size.get("shortest_edge"):
        return {"crop_pct": cut / size["shortest_edge"]} if cut else {}
    if size.get("height"):
        return {"crop_mode": "squash", **({"crop_pct": cut / size["height"]} if cut else {})}
    return {}


@contextlib.contextmanager
def _same_random_weights():
    """A head that no checkpoint fills is the same each time the model is loaded."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield
