"""Train the small ViT that ships with the quickstart, from scratch, on Fashion-MNIST.

    python benchmarks/train_fashion_vit.py --data /usr/share/datasets/fashion-mnist --out fashion_vit

The data is the original four IDX files (Debian: ``apt install dataset-fashion-mnist``, MIT licence).
Two thirds of the epochs run on a random half of the patches to save time (PatchDropout, arXiv
2208.07220); the last third sees every patch. A checkpoint is written after each epoch, and every
epoch seeds its own generator, so an interrupted training can go on. The result is a timm folder:
``config.json`` + ``model.safetensors``.
"""

import argparse
import gzip
import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

CLASSES = (
    "tshirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)
MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images
MODEL_ARGS = {"img_size": 28, "patch_size": 4, "in_chans": 1, "embed_dim": 64, "depth": 12, "num_heads": 4}
BATCH = 128


def read_idx(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The images (N, 28, 28) uint8 and labels (N,) of ``train`` or ``t10k``."""
    images = gzip.decompress((folder / f"{split}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{split}-labels-idx1-ubyte.gz").read_bytes())
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
    return torch.from_numpy(pixels.copy()), torch.from_numpy(np.frombuffer(labels, np.uint8, offset=8).astype(np.int64))


def normalise(images: torch.Tensor) -> torch.Tensor:
    return ((images.float() / 255 - MEAN) / STD).unsqueeze(1)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift every image by up to two pixels and mirror half of them."""
    count = len(images)
    padded = F.pad(images, (2, 2, 2, 2))
    top, left = torch.randint(0, 5, (2, count, 1), generator=generator)
    columns = left + torch.arange(28)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    rows = top + torch.arange(28)
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over the first 5 %, then a cosine to zero."""
    if progress < 0.05:
        return peak * progress / 0.05
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - 0.05) / 0.95))


@torch.inference_mode()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    right = sum(
        (model(normalise(images[i : i + 500])).argmax(-1) == labels[i : i + 500]).sum().item()
        for i in range(0, len(labels), 500)
    )
    return right / len(labels)


def created(name: str) -> torch.nn.Module:
    """A model with patch dropout, if it can have that: a bias for each pair of places needs all of them."""
    asked = {"num_classes": len(CLASSES), **MODEL_ARGS}
    try:
        return timm.create_model(name, patch_drop_rate=0.5, **asked)
    except TypeError:
        return timm.create_model(name, **asked)


def train(arguments: argparse.Namespace) -> None:
    folder, out = Path(arguments.data), Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    images, labels = read_idx(folder, "train")
    test_images, test_labels = read_idx(folder, "t10k")
    torch.manual_seed(arguments.seed)
    model = created(arguments.model)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    other = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    first, checkpoint = 0, out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"]
    steps = len(labels) // BATCH
    for epoch in range(first, arguments.epochs):
        started = time.time()
        model.train()
        if hasattr(model, "patch_drop"):
            model.patch_drop.prob = 0.5 if epoch < arguments.epochs * 2 // 3 else 0.0
        generator = torch.Generator().manual_seed(arguments.seed * 1000 + epoch)
        torch.manual_seed(arguments.seed * 1000 + epoch)
        order = torch.randperm(len(labels), generator=generator)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate((epoch * steps + step) / (arguments.epochs * steps), arguments.lr)
            batch = order[step * BATCH : (step + 1) * BATCH]
            logits = model(augment(normalise(images[batch])[:, 0], generator)[:, None])
            loss = F.cross_entropy(logits, labels[batch])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
        state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "epoch": epoch + 1}, out / "checkpoint.tmp")
        (out / "checkpoint.tmp").replace(checkpoint)
        score = accuracy(average.module, test_images, test_labels)
        seconds = time.time() - started
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test {score:.4f}, {seconds:.0f} s", flush=True)
    write_folder(average.module, out, arguments, accuracy(average.module, test_images, test_labels))


def write_folder(model: torch.nn.Module, out: Path, arguments: argparse.Namespace, score: float) -> None:
    """What ``timm.create_model("local-dir:...")`` reads, with how it came about and what it scores."""
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out / "model.safetensors")
    config = {
        "architecture": arguments.model,
        "num_classes": len(CLASSES),
        "model_args": MODEL_ARGS,
        "pretrained_cfg": {
            "input_size": [1, 28, 28],
            "mean": [MEAN],
            "std": [STD],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "num_classes": len(CLASSES),
            "classifier": "head",
            "first_conv": "patch_embed.proj",
            "label_names": CLASSES,
        },
        "training": {
            "data": "Fashion-MNIST, 60,000 training images (MIT licence)",
            "script": "benchmarks/train_fashion_vit.py",
            "seed": arguments.seed,
            "epochs": arguments.epochs,
            "lr": arguments.lr,
            "test_top1": round(score, 4),
            "test_images": 10000,
            "versions": {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()},
        },
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with the four .gz files")
    parser.add_argument("--out", required=True, help="folder to write; an unfinished training there continues")
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="timm name, whose sizes are not taken over")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())
