"""The same images in every form that is read: a folder, tar files, shards and datasets."""

import functools
import io
import json
import tarfile
from pathlib import Path

import pytest
from conftest import fashion_sample
from families import FAMILIES
from PIL import Image

from tosa_convert.data.images import Images
from tosa_convert.models.provenance import preprocessing_of

NAMES = ("0-one", "1-two", "2-three")


@functools.cache
def built_in() -> list[bytes]:
    """Images of the built-in sample."""
    with fashion_sample() as archive:
        return [archive.read(name) for name in archive.namelist()[:64] if name.endswith(".png")]


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.open(io.BytesIO(built_in()[number])).convert("RGB").resize((40, 40)).save(stream, format="PNG")
    return stream.getvalue()


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def sources_in(root: Path) -> dict[str, str]:
    """The same nine images, three of each class, in every form; {form: source}."""
    with tarfile.open(root / "all.tar", "w") as archive:
        for index in range(9):
            label = index // 3
            place = root / "folder" / NAMES[label]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{index}.png").write_bytes(png(index))
            add(archive, f"{NAMES[label]}/{index}.png", png(index))
    (root / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(root / "shards" / f"part-{shard:03d}.tar", "w") as archive:
            for index in range(shard * 5, min(9, shard * 5 + 5)):
                add(archive, f"{index:06d}.png", png(index))
                add(archive, f"{index:06d}.json", json.dumps({"label": index // 3, "caption": "x"}).encode())
                add(archive, f"{index:06d}.txt", b"a caption")
    forms = {
        "folder": str(root / "folder"),
        "tar": f"tar:{root / 'all.tar'}",
        "wds": f"wds:{root / 'shards'}",
        "wds braces": f"wds:{root / 'shards'}/part-{{000..001}}.tar",
    }
    return {**forms, **_datasets(root)}


def _datasets(root) -> dict[str, str]:
    try:
        import datasets
    except ImportError:
        return {}
    rows = {"image": [{"bytes": png(index), "path": None} for index in range(9)], "label": [i // 3 for i in range(9)]}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))}
    named = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    (root / "parquet").mkdir()
    named.to_parquet(root / "parquet" / "train-00000.parquet")
    named.select(range(3)).to_parquet(root / "parquet" / "test-00000.parquet")
    place = root / "parquet"
    return {"hfds": f"hfds:{place}", "hfds test": f"hfds:{place}:test", "hfids": f"hfids:{place}"}


def read(sources, form, **options):
    if form not in sources:
        pytest.skip("datasets is not installed")
    return Images(sources[form], preprocessing_of(FAMILIES["timm vit"]()), **options)
