"""Runs on the Hugging Face hub."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import safe_open

from tosa_convert.base.errors import TosaError, UsageError, gist
from tosa_convert.base.files import read_json, write_json, write_text
from tosa_convert.base.quiet import quiet
from tosa_convert.runs import folder as runs

SHIPPED = (
    "README.md",
    "model.safetensors",
    "recipe.yaml",
    "model.onnx",
    "model-*.onnx.data",
    "preprocessing.json",
    "*.png",
)
"""What of a run goes to the hub beside its config.json; logs, checkpoints and reports stay."""
OPENED = ("config.json", "model.safetensors")
"""What it takes to open one from there."""
PATH = re.compile(r"(?<![\w/.])(?:/(?!/)|~/)[^\s`\"|)\]]+")
"""An absolute path within a text; not what an address on the web has."""


def run_of(name: str) -> Path | None:
    """The local copy of a run on the hub, ORG/NAME, fetched if need be; None if there is no run of that name.

    Raises:
        TosaError: the hub shows nothing of that name to this token, or cannot be reached.
    """
    try:
        with quiet("huggingface_hub"):  # it says how often it tries
            config = Path(hf_hub_download(name, "config.json"))
        if not runs.is_run(config.parent):
            return None
        return Path(snapshot_download(name, allow_patterns=list(OPENED)))
    except LocalEntryNotFoundError:
        raise TosaError(
            f"the hub cannot be reached, and {name} is not in its cache here; try again with a network, or give a "
            "local folder"
        ) from None
    except HfHubHTTPError as error:
        if not isinstance(error, RepositoryNotFoundError) and _status(error) not in (401, 403):
            return None
        raise TosaError(
            f"the hub shows no {name} to you; check the name, and if it is private log in with `hf auth login`, or set "
            "HF_TOKEN to a token that may read it"
        ) from None
    except Exception:  # no such name, no such file: whoever looks for a model there will say so
        return None


def push(run: Path, name: str, *, private: bool = True, may_overwrite: Callable[[list[str]], bool]) -> str:
    """Put a finished run on the hub; gives its address there.

    What its config says of folders of this machine stays here.

    Args:
        name: ORG/NAME.
        private: whether only its owners see it, where it is made anew.
        may_overwrite: asked with the names of files that are there already and would be replaced.

    Raises:
        UsageError: not a run, a name that the hub does not take, no token, or files that may not be replaced.
        TosaError: the hub cannot be reached, or refuses.
    """
    runs.check_finished(run)
    if name.count("/") != 1:
        raise UsageError(f"{name!r} is no name on the hub; give ORG/NAME, such as my-team/fast-vit")
    _check_weights(run)
    api = HfApi()
    try:
        place = api.create_repo(name, private=private, exist_ok=True)
        there = set(api.list_repo_files(place.repo_id))
        ours = {"config.json", *(path.name for pattern in SHIPPED for path in run.glob(pattern))}
        replaced = sorted(there & ours)
        if replaced and not may_overwrite(replaced):
            raise UsageError(
                f"{name} holds {', '.join(replaced)} already; add --yes to replace them, or give another name"
            )
        with tempfile.TemporaryDirectory() as scratch:
            write_json(Path(scratch) / "config.json", _without_places(read_json(run / "config.json")))
            for file in sorted(ours - {"config.json", "README.md", "recipe.yaml"}):
                (Path(scratch) / file).symlink_to((run / file).resolve())
            if "recipe.yaml" in ours:
                recipe = _shortened(yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8")))
                text = yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=110)
                write_text(Path(scratch) / "recipe.yaml", _without_folder(text, run))
            if "README.md" in ours:
                text = (run / "README.md").read_text(encoding="utf-8")
                text = text.replace(f"# {run.name}\n", f"# {name}\n", 1).replace("hf:ORG/NAME", f"hf:{name}")
                write_text(Path(scratch) / "README.md", _nameless(_without_folder(text, run)))
            message = f"tosa-convert run {run.name}"
            api.upload_folder(repo_id=place.repo_id, folder_path=scratch, commit_message=message)
    except HFValidationError as error:
        raise UsageError(f"the hub takes no name {name!r}; give ORG/NAME: {gist(error)}") from None
    except LocalTokenNotFoundError:
        raise UsageError("there is no token for the hub; log in with `hf auth login`, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        status = _status(error)
        if status in (401, 403):
            raise UsageError(
                f"the hub does not let you write to {name} ({status}); log in with `hf auth login`, set HF_TOKEN to a "
                "token that may write, or give another name"
            ) from None
        raise TosaError(f"the hub refused: {gist(error)}; nothing was changed, or run the command again") from None
    except TosaError:
        raise
    except Exception as error:  # of whatever library the hub's own one talks through
        raise TosaError(f"the hub cannot be reached: {gist(error)}; run the command again with a network") from None
    return str(place)


def _status(error: HfHubHTTPError) -> int | None:
    return getattr(error.response, "status_code", None)


def _check_weights(run: Path) -> None:
    try:
        with safe_open(run / "model.safetensors", "pt") as opened:
            opened.keys()
    except Exception as error:
        raise TosaError(f"the weights of {run} cannot be read ({gist(error)}); run its recipe again") from None


def _without_places(config: dict) -> dict:
    """A run's config without the folders and files of this machine that its model was loaded from."""
    origin = dict(config["origin"])
    source = origin.get("source")
    if source is not None and Path(source).exists():
        origin["source"] = None
    origin |= {name: None for name in ("checkpoint", "head_checkpoint") if origin.get(name)}
    if origin["checkpoint"] is None and config["origin"].get("checkpoint"):
        origin["source"] = None  # its weights came from a file
    return _shortened({**config, "origin": origin})


def _shortened(content: Any) -> Any:
    """Nested values with the last part in the place of each absolute path."""
    if isinstance(content, dict):
        return {key: _shortened(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_shortened(value) for value in content]
    if not isinstance(content, str):
        return content
    return Path(content).name if content.startswith(("/", "~")) else _nameless(content)


def _nameless(text: str) -> str:
    """With the last part in the place of each absolute path, also behind the kind of a source, as in depth:ROOT."""
    return PATH.sub(lambda found: Path(found[0]).name, text)


def _without_folder(text: str, run: Path) -> str:
    """A text that names the run without the folders that it lies in."""
    for folder in {str(run), str(run.resolve()), str(run.absolute())}:
        text = text.replace(folder, run.name)
    return text
