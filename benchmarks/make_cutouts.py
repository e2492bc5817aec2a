"""Paste cut-out garments on photos: images with true masks, for a model of saliency.

    python benchmarks/make_cutouts.py --photos PHOTOS --fashion FASHION --part t10k --count 300 --out cutouts

PHOTOS is any folder of photos; FASHION holds Fashion-MNIST's IDX files (MIT), whose black background gives each
garment its outline. Garment, place, size and tint are drawn by seed; images and masks, 224 px, are in the layout of
masks:ROOT. The photos are real, the pasting is not.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track
from scipy.ndimage import binary_fill_holes

SIDE, OUTLINE = 224, 40
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif")


def garments(folder: Path, part: str) -> np.ndarray:
    """(N, 28, 28) uint8."""
    content = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
    return np.frombuffer(content, np.uint8, offset=16).reshape(-1, 28, 28)


def photos(folders: list[Path]) -> list[Image.Image]:
    """Those that are in colour and large enough."""
    found = []
    for file in sorted(file for folder in folders for file in folder.rglob("*")):
        if file.suffix.lower() in SUFFIXES:
            try:
                with Image.open(file) as opened:
                    pixels = np.asarray(opened.convert("RGB"))
            except OSError:  # of several pages, or in no form that is known
                continue
            coloured = np.ptp(pixels.astype(int), axis=2).mean() > 4
            if min(pixels.shape[:2]) >= SIDE and coloured:
                found.append(Image.fromarray(pixels))
    return found


def draw(photo: Image.Image, garment: np.ndarray, random: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """An image and its mask."""
    side = int(min(photo.size) * random.uniform(0.6, 1))
    left, top = (random.integers(0, length - side + 1) for length in photo.size)
    behind = np.asarray(photo.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    size = int(random.integers(110, 190))
    large = np.asarray(Image.fromarray(garment).resize((size, size), Image.Resampling.BICUBIC), np.float32)
    outline = Image.fromarray(np.uint8(255 * binary_fill_holes(garment > OUTLINE)))
    cover = np.asarray(outline.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255
    across, down = random.integers(0, SIDE - size + 1, 2)
    alpha, light = np.zeros((2, SIDE, SIDE), np.float32)
    alpha[down : down + size, across : across + size] = cover
    light[down : down + size, across : across + size] = large / 255
    tint = random.uniform(60, 255, 3)
    seen = behind * (1 - alpha[..., None]) + light[..., None] * tint * alpha[..., None]
    return Image.fromarray(seen.round().astype(np.uint8)), Image.fromarray(np.uint8(255 * (alpha > 0.5)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", required=True, type=Path, nargs="+")
    parser.add_argument("--fashion", required=True, type=Path)
    parser.add_argument("--part", choices=["train", "t10k"], default="t10k")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, type=Path)
    given = parser.parse_args()
    items, scenes = garments(given.fashion, given.part), photos(given.photos)
    print(f"{len(scenes)} photos")
    for name in ("images", "masks"):
        (given.out / name).mkdir(parents=True, exist_ok=True)
    for index in track(range(given.count)):
        random = np.random.default_rng((given.seed, index))
        image, mask = draw(scenes[index % len(scenes)], items[random.integers(len(items))], random)
        image.save(given.out / "images" / f"{index:05d}.png")
        mask.save(given.out / "masks" / f"{index:05d}.png")


if __name__ == "__main__":
    main()
