"""How much of a plan's error is gone after a short fine-tuning without labels, judged on photos that neither plan nor
training has seen.

    apt install endless-sky-data opencv-doc        # 273 photos of landscapes and cities; the scenes to be judged on
    python benchmarks/plan_finetune.py dinov2 dinov2/timm.safetensors /usr/share/doc/opencv-doc/examples/data \\
        --train /usr/share/games/endless-sky/images/land

Plans are made on the everyday scenes that travel in the package. Training sees random crops of eleven in twelve of the
photos, the others tell what it gains on more of the same kind, and tuned its settings; without ``--train`` it sees the
scenes of the plan and those of Debian's opencv-doc that show something else than the 24 scenes it is judged on. The
target is the original's last tokens.
"""

import argparse
import copy
import shutil
import tempfile
import time
from pathlib import Path

import record
from methods import MODELS, SCENES, scenes_of

from tosa_convert import FinetuneSettings, convert, finetune
from tosa_convert.base.progress import Progress
from tosa_convert.data.images import built_in_photos
from tosa_convert.data.sampling import sample
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.planning.comparison import mean_figures
from tosa_convert.planning.plan import find_plan

BUDGETS = (0.7, 0.6)
HELD_OUT = 12
"""One in so many photos of a folder is not trained on."""
OTHERS = (
    "Blender_Suzanne1",
    "blox",
    "left01",
    "right07",
    "ela_original",
    "sudoku",
    "text_defocus",
    "imageTextN",
    "pic1",
    "pic5",
    "ellipses",
    "digits",
    "gradient",
    "opencv-logo",
)
"""Of opencv-doc's, what shows no scene that is judged on, from another side or otherwise."""
SETTINGS = {"batch_size": 8, "labels": 0.0, "logits": 0.0, "features": 1.0, "scale": (0.15, 1.0), "layer_decay": 0.8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("weights", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--train", type=Path, help="a folder of photos to train on")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=5e-6)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plan_finetune.json"))
    arguments = parser.parse_args()
    settings = FinetuneSettings(steps=arguments.steps, lr=arguments.lr, precision=arguments.precision, **SETTINGS)
    assert not SCENES.intersection(OTHERS)
    model = MODELS[arguments.model][0](arguments.weights).eval()
    images = sample(None, preprocessing_of(model), 24)[0]
    rows = {}
    with tempfile.TemporaryDirectory() as folder, scenes_of(arguments.photos) as scenes:
        seen, held_out = split(Path(folder), arguments.photos, arguments.train)
        judged = {"other photos": scenes, **({"held out": held_out} if arguments.train else {})}
        unseen = {name: sample(place, preprocessing_of(model), 24)[0] for name, place in judged.items()}
        for budget in arguments.budgets:
            plan = convert(copy.deepcopy(model), find_plan(model, images, budget, progress=Progress()).config)
            before, started = _errors(model, plan, unseen), time.monotonic()
            finetune(plan, seen, settings, progress=Progress())
            minutes = (time.monotonic() - started) / 60
            after = _errors(model, plan, unseen)
            left = {name: {key: after[name][key] / error for key, error in before[name].items()} for name in before}
            rows[str(budget)] = {"before": before, "after": after, "left": left, "minutes": minutes}
            print(budget, rows[str(budget)], flush=True)
            found = {"model": arguments.model, "photos": len(list(seen.iterdir())), "settings": settings.model_dump()}
            record.write(arguments.out, {**found, "budgets": rows})


def split(folder: Path, photos: Path, train: Path | None) -> tuple[Path, Path]:
    """The photos to train on, and those held out, each in a folder of its own."""
    places = folder / "seen", folder / "held out"
    for place in places:
        place.mkdir()
    if train is None:
        files = [*built_in_photos().glob("*.jpg"), *(found(photos, name) for name in OTHERS)]
    else:
        files = sorted(path for path in train.iterdir() if path.suffix in (".jpg", ".png"))
    for index, file in enumerate(files):
        shutil.copy(file, places[train is not None and index % HELD_OUT == 0])
    return places


def found(photos: Path, name: str) -> Path:
    return next(photos.glob(f"{name}.*"))


def _errors(model, plan, unseen: dict) -> dict:
    """1 − cosine to the original's patch tokens and class token, or to its output."""
    found = {name: mean_figures(model, {"plan": plan}, images, None)["plan"] for name, images in unseen.items()}
    return {
        name: {key: 1 - figures[key] for key in ("patch", "class") if key in figures} for name, figures in found.items()
    }


if __name__ == "__main__":
    main()
