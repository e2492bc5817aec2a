"""Methods on the quickstart's model, fine-tuned on all of Fashion-MNIST until nothing is left to gain: top-1 on all
10,000 test images at 0.7 and 0.5 of the multiply–adds, three seeds.

    python benchmarks/fashion_trained_out.py --data /usr/share/datasets/fashion-mnist --work fashion_work

The data is the original four IDX files (Debian: ``apt install dataset-fashion-mnist``, MIT licence). Each run goes over
the 60,000 training images for ten epochs with a cosine to zero, from the same weights and with the same settings;
ToSA's selectors and token impact's filter are distilled first, SPA's gates trained first for as long, with the objects'
silhouettes as selection labels. "original" is the unconverted model, trained on in the same way. A run takes 30 to 45
minutes on one core, an hour or more with token impact, and with MCTF, whose loss takes two passes; each is kept in the
work folder with its checkpoints until it is in the results, so the script may be stopped and started again, and
``--methods``, ``--budgets`` and ``--seeds`` do part of the work. On a GPU (``--device cuda --processes 8``) several are
trained at once.
"""

import functools
from pathlib import Path

from gates import silhouettes
from method_rows import METHODS, ORIGINAL, Task, arguments_of, fill
from PIL import Image
from train_fashion_vit import CLASSES, read_idx

from tosa_convert import load

BUDGETS = (0.7, 0.5)
SETTINGS = {"batch_size": 128, "augment": "flip", "precision": "bf16", "checkpoint_minutes": 2.0}
FINETUNE = {**SETTINGS, "epochs": 10.0, "lr": 3e-4, "weight_decay": 0.05}
DISTILL = {**SETTINGS, "steps": 300}


def main() -> None:
    names = (ORIGINAL, *METHODS)
    parser = arguments_of(__doc__, names, BUDGETS, Path("benchmarks/results/fashion_trained_out.json"))
    parser.add_argument("--data", type=Path, required=True)
    parser.set_defaults(seeds=[0, 1, 2])
    arguments = parser.parse_args()
    train, test = (unpacked(arguments.data, arguments.work, split) for split in ("train", "t10k"))
    opened = functools.partial(load, "quickstart")
    masks = outlined(train, arguments.work)
    task = Task(opened, train, test, arguments.work, FINETUNE, DISTILL, arguments.device, masks=masks)
    fill(task, arguments, {"precision": SETTINGS["precision"]}, {})


def unpacked(data: Path, work: Path, split: str) -> Path:
    """A folder with one sub-folder per class of the images of a split."""
    folder = work / split
    if not (folder / "whole").exists():
        for index, (image, label) in enumerate(zip(*read_idx(data, split), strict=True)):
            place = folder / "images" / f"{label.item()}-{CLASSES[label]}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).save(place / f"{index:05d}.png", compress_level=1)
        (folder / "whole").touch()
    return folder / "images"


def outlined(train: Path, work: Path) -> Path:
    """A folder with the silhouette of the object in each image."""
    masks = work / "silhouettes"
    if not (work / "outlined").exists():
        silhouettes(train, masks)
        (work / "outlined").touch()
    return masks


if __name__ == "__main__":
    main()
