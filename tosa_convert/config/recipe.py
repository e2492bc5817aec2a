"""Recipes: YAML in, a validated recipe out. Everything wrong with a file is reported at once, with its line."""

import difflib
import math
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, field_validator, model_validator

from tosa_convert.base.errors import UsageError
from tosa_convert.config.conversion import ConvertConfig, unknown_options
from tosa_convert.config.settings import DistillSettings, ExportSettings, FinetuneSettings

PARTS = ("", "data", "convert", "distill", "finetune", "export")
"""Where a recipe has keys; the top first."""
Pixels = Annotated[int, Field(ge=1)]


class Data(BaseModel):
    """Folders of images. Without ``train`` the built-in photos serve, without ``eval`` the training folder.

    ``masks``, a folder, or ``boxes``, a COCO file, say what in the training images matters, for gates. ``list``, and
    for ``eval`` ``eval_list``, name the images of nyu:ROOT and kitti:ROOT; ``depth_scale`` says what a metre is in the
    PNG files of depth:ROOT. Without ``eval_labels`` the sub-folders of ``eval`` are no classes.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    train: str | None = None
    eval: str | None = None
    masks: str | None = None
    boxes: str | None = None
    list: str | None = None
    eval_list: str | None = None
    eval_labels: bool = True
    depth_scale: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _of_eval(self) -> "Data":
        for name, given in (("eval_list", self.eval_list is not None), ("eval_labels: false", not self.eval_labels)):
            if given and self.eval is None:
                raise ValueError(f"{name} is for the images of eval:, which are not named; add them, or leave it out")
        return self


class Recipe(BaseModel):
    """All that a piece of work needs. The stages that are present run, in this order: distill, finetune, export.

    ``mean_macs``, of conversions with thresholds, is the share of the original's multiply–adds that the training images
    take on average after each stage that trains: thresholds are moved for it.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    checkpoint: str | None = None
    img_size: Pixels | Annotated[tuple[Pixels, Pixels], Strict(False)] | None = None
    num_classes: int | None = Field(default=None, ge=0)
    task: str | None = None
    head: str | None = None
    head_checkpoint: str | None = None
    max_depth: float | None = Field(default=None, gt=0)
    mean_macs: float | None = Field(default=None, gt=0, lt=1)
    seed: int = Field(default=0, ge=0)
    data: Data = Data()
    convert: ConvertConfig = ConvertConfig()
    distill: DistillSettings | None = None
    finetune: FinetuneSettings | None = None
    export: ExportSettings | None = None

    @field_validator("data", "convert", "distill", "finetune", "export", mode="before")
    @classmethod
    def _present_means_defaults(cls, value: Any) -> Any:
        """``distill:`` with nothing after it asks for the stage with its defaults."""
        return {} if value is None else value

    @model_validator(mode="after")
    def _one_seed(self) -> "Recipe":
        """The selectors and the random control follow the recipe's seed, unless they have one of their own."""
        if "seed" not in self.convert.model_fields_set:
            following = self.convert.model_copy(update={"seed": self.seed})
            following.model_fields_set.discard("seed")  # so that it follows another one too
            self.convert = following
        return self

    def to_yaml(self) -> str:
        """Resolved: every value spelled out but those that are nothing, as stages that do not run."""
        stages = {name: value for name, value in _given(self).items() if value != {}}
        return yaml.safe_dump(stages, sort_keys=False, default_flow_style=None, width=110)


def _given(part: BaseModel) -> dict[str, Any]:
    """What a recipe or a part of it says; nothing that would be nothing anyway."""
    given = part.model_dump(mode="json")
    defaults = {name: field.default for name, field in type(part).model_fields.items()}
    given = {name: value for name, value in given.items() if value is not None or defaults.get(name) is not None}
    if given.get("r") is not None:  # of a schedule, in place of the ratio
        given.pop("ratio")
    parts = {name: _given(value) for name, value in part if isinstance(value, BaseModel)}
    return {**given, **parts}


def recipes_folder() -> Path:
    """The recipes that travel with the package (beside it, in a checkout)."""
    packaged = Path(str(files("tosa_convert") / "recipes"))
    return packaged if packaged.is_dir() else packaged.parent.parent / "recipes"


def find_recipe(name: str) -> Path:
    """A recipe file by path, or one of ours by name, with or without .yaml."""
    path = Path(name)
    if path.is_file():
        return path
    ours = recipes_folder() / f"{path.name.removesuffix('.yaml')}.yaml"
    if ours.is_file() and path.parent == Path():
        return ours
    if path.suffix in (".yaml", ".yml") or path.parent != Path():
        raise UsageError(f"there is no file {name}; give a recipe file, or one of `tosa-convert recipes ls`")
    known = sorted(path.stem for path in recipes_folder().glob("*.yaml"))
    near = difflib.get_close_matches(path.stem, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"the built-in ones are {', '.join(known)}"
    raise UsageError(f"there is no recipe {name!r}; {hint}")


def read_recipe(path: Path) -> Recipe:
    """A validated recipe.

    Raises:
        UsageError: every unknown key, wrong type and impossible value, each with its line and, for
            a misspelt key, the nearest valid one.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
        problems = [(line, f"{key}: is given twice") for line, key in _duplicates(tree)]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the recipe {path}: {error}") from None
    except RecursionError:
        raise UsageError(f"{path}: an anchor of YAML refers to itself; write the values out") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise UsageError(f"{path}: {line}not valid YAML ({getattr(error, 'problem', None) or error})") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} is not a recipe: it should hold keys such as model:, convert:, distill:")
    if isinstance(content.get("convert"), dict):
        # Which keys there are depends on the parts, so that pydantic would tell only once all else is right.
        unknown = unknown_options(content["convert"])
        problems += [(_line(tree, ("convert", key)), f"convert.{key}: {message}") for key, message in unknown.items()]
        content["convert"] = {key: value for key, value in content["convert"].items() if key not in unknown}
    try:
        recipe = Recipe(**content)
    except (ValidationError, TypeError) as error:
        found = error.errors() if isinstance(error, ValidationError) else [{"loc": (), "msg": str(error), "type": ""}]
        # A union reports once per member that did not fit; the first says enough.
        firsts = {".".join(_names(item["loc"])): item for item in reversed(found)}
        problems += [(_line(tree, item["loc"]), _describe(item)) for item in firsts.values()]
    if problems:
        lines = [f"line {line}: {text}" for line, text in sorted(problems)]
        raise UsageError(f"{path}: " + ("; ".join(lines) if len(lines) == 1 else "\n  " + "\n  ".join(lines)))
    return recipe


def _describe(item: dict) -> str:
    names = _names(item["loc"])
    key = ".".join(names)
    if item["type"] == "extra_forbidden":
        known = _fields(names[:-1])
        near = difflib.get_close_matches(names[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"valid here: {', '.join(known) or 'nothing'}"
        elsewhere = next((part for part in PARTS if names[-1] in _fields([part] if part else [])), None)
        if elsewhere is not None:
            hint = f"it belongs under {elsewhere}:" if elsewhere else "it belongs at the top, beside model:"
        return f"{key}: unknown key; {hint}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "float_type" and isinstance(item["input"], str) and _is_number(item["input"]):
        return f"{key}: YAML takes {item['input']} for text; write it with a decimal point, as in 1.0e-3"
    custom = item["type"] == "value_error"
    given = (
        f" (given: {item['input']!r})" if not custom and isinstance(item.get("input"), (str, int, float, bool)) else ""
    )
    return f"{key}: {message}{given}"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _names(location: tuple) -> list[str]:
    """The keys of a location, without what pydantic adds of the types it tried ("constrained-int", "list[...]")."""
    types = ("int", "float", "str", "constrained-int", "constrained-float")
    return [str(part) for part in location if part not in types and "[" not in str(part)]


def _fields(path: list[str]) -> list[str]:
    """The valid keys at a place in a recipe; none where it has no such place."""
    model: type[BaseModel] = Recipe
    for name in path:
        if name not in model.model_fields:
            return []
        candidates = getattr(model.model_fields[name].annotation, "__args__", (model.model_fields[name].annotation,))
        model = next(kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel))
    return list(model.model_fields)


def _line(tree: yaml.Node, location: tuple) -> int:
    """The line of the deepest part of a location that the file has."""
    node, line = tree, tree.start_mark.line
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == str(part)), None)
            if found is None:
                continue
            line, node = found[0].start_mark.line, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line
    return line + 1


def _duplicates(node: yaml.Node) -> list[tuple[int, str]]:
    """(line, key) of keys that their mapping has already."""
    found = []
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                found.append((key.start_mark.line + 1, key.value))
            seen.add(key.value)
            found += _duplicates(value)
    return found
