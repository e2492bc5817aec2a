"""Pack a sample of Fashion-MNIST (MIT licence) for the quickstart: the first images of each split, as PNG.

    python benchmarks/make_quickstart_sample.py --data /usr/share/datasets/fashion-mnist \
        --out tosa_convert/assets/fashion_sample.zip

The folders are named so that they sort in label order.
"""

import argparse
import io
import zipfile
from pathlib import Path

from PIL import Image
from train_fashion_vit import CLASSES, read_idx

SPLITS = {"train": ("train", 6000), "test": ("t10k", 4000)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=Path, help="folder with the four .gz files")
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    with zipfile.ZipFile(arguments.out, "w", zipfile.ZIP_STORED) as archive:
        for split, (name, count) in SPLITS.items():
            images, labels = read_idx(arguments.data, name)
            for index in range(count):
                png = io.BytesIO()
                Image.fromarray(images[index].numpy()).save(png, "PNG", optimize=True)
                label = int(labels[index])
                entry = zipfile.ZipInfo(f"{split}/{label}-{CLASSES[label]}/{index:05d}.png", (2017, 8, 25, 0, 0, 0))
                archive.writestr(entry, png.getvalue())
