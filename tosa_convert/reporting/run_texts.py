"""What is written into a run for readers: report.md, its tables; and README.md, the model card that the hub shows."""

from pathlib import Path

import yaml

from tosa_convert.base.files import read_json, write_text
from tosa_convert.reporting.result_tables import tables_of

MARK = "<!-- written by tosa-convert"
"""Where it stands, the file is ours to write again."""
TAGS = ["tosa-convert", "vision-transformer", "token-reduction"]


def write_report(run: Path) -> None:
    """``report.md`` of a run, and its model card."""
    config = read_json(run / "config.json")
    head = (
        f"# {run.name}\n\nMade by tosa-convert {config['tosa_convert']}, {config['created']}; recipe in recipe.yaml.\n"
    )
    write_text(run / "report.md", "\n".join([head, *(table.markdown() for table in tables_of(run))]))
    write_card(run)


def write_card(run: Path) -> None:
    """``README.md`` of a finished run; one that someone else has written stays."""
    file = run / "README.md"
    if file.exists() and MARK not in file.read_text(encoding="utf-8"):
        return
    config = read_json(run / "config.json")
    write_text(file, _head(config) + _body(run, config) + "\n".join(table.markdown() for table in tables_of(run)))


def _head(config: dict) -> str:
    """What the hub reads."""
    origin = config["origin"]
    known: dict = {"library_name": "tosa-convert", "tags": TAGS}
    if _licence(origin):
        known["license"] = _licence(origin)
    source = origin.get("source") or ""
    if origin.get("checkpoint"):  # weights of the user's own: of what, nobody said
        pass
    elif source.startswith("hf:"):
        known["base_model"] = source.removeprefix("hf:")
    elif origin["library"] == "timm" and origin["spec"].get("pretrained_cfg", {}).get("hf_hub_id"):
        known["base_model"] = origin["spec"]["pretrained_cfg"]["hf_hub_id"].rstrip("/")
    return f"---\n{yaml.safe_dump(known, sort_keys=False)}---\n\n"


def _licence(origin: dict) -> str | None:
    """That of the original's weights, where the library tells; it does not know those of a file."""
    return None if origin.get("checkpoint") else (origin["spec"].get("pretrained_cfg") or {}).get("license")


def _body(run: Path, config: dict) -> str:
    origin, conversion = config["origin"], config.get("convert")
    what = origin["spec"].get("architecture") or origin["spec"].get("class")
    how = "as it is, trained further"
    if conversion:
        layers = len(conversion.get("layers") or []) or "some"
        how = (
            f"made token-selective (score {conversion['score']}, bypass {conversion['bypass']}): only the tokens that "
            f"need it run {layers} of its layers"
        )
    licence = "The licence of the original's weights is their publisher's, and holds for these."
    if _licence(origin):
        licence = f"The original's weights are under {_licence(origin)}."
    size = " × ".join(map(str, origin["preprocessing"]["size"]))
    onnx = ""
    if (run / "model.onnx").exists():
        onnx = "\n`model.onnx` is the checked ONNX file; `preprocessing.json` says how its images are made.\n"
    return (
        f"# {run.name}\n\n{MARK} {config['tosa_convert']}; a text of your own stays if this line goes -->\n\n"
        f"`{what}` ({origin['library']}), {how}. Images of {size} pixels. {licence}\n\n"
        '```python\nimport tosa_convert\n\nmodel = tosa_convert.load("hf:ORG/NAME")  # or this folder\n```\n'
        f"{onnx}\n"
    )
