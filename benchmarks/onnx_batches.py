"""Whether an ONNX file should take batches of images that keep different numbers of tokens: ways to pack them in the
graph against one image at a time, on the real ViT-S/14 in ONNX Runtime.

    python benchmarks/onnx_batches.py dinov2/timm.safetensors --photos /usr/share/doc/opencv-doc/examples/data

The blocks of the model run on the tokens that an adaptive plan chose for each image, which are given to the graph:
choosing and merging cost the same in each way and are left out, so skipped tokens stay as they are. ``alone`` is what
the project exports, called once for each image. ``row`` packs all tokens into a row with one attention over it and a
block-diagonal mask. ``unpacked`` packs projections and MLP, and pads the attention to the image with the most tokens.
``padded`` pads all of the layer to it. The original at the same batch is what they are compared with.
"""

import argparse
import copy
import functools
import tempfile
from contextlib import nullcontext
from pathlib import Path

import methods
import numpy as np
import onnxruntime
import record
import torch
import torch.nn.functional as F
from torch import nn

from tosa_convert import convert, load
from tosa_convert.base.timing import Timing, interleave, pinned
from tosa_convert.data.sampling import sample
from tosa_convert.models.adapter import run
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.planning.plan import find_plan
from tosa_convert.selective.selection import last_choices

BUDGET = 0.7


class Blocks(nn.Module):
    """Tokens (B, N, D) and which of them attend in each layer (L, B, N) → tokens (B, N, D)."""

    def __init__(self, blocks: nn.Sequential, way: str):
        super().__init__()
        self.blocks, self.way = blocks, way
        self.eval()

    def forward(self, tokens: torch.Tensor, attends: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.blocks):
            tokens = getattr(self, self.way)(block, tokens, attends[index])
        return tokens

    def original(self, block: nn.Module, tokens: torch.Tensor, attends: torch.Tensor) -> torch.Tensor:
        return block(tokens)

    def alone(self, block: nn.Module, tokens: torch.Tensor, attends: torch.Tensor) -> torch.Tensor:
        """Of a batch of one."""
        chosen = found(attends.flatten())
        return tokens.index_copy(1, chosen, block(tokens[:, chosen]))

    def row(self, block: nn.Module, tokens: torch.Tensor, attends: torch.Tensor) -> torch.Tensor:
        flat, chosen = tokens.flatten(0, 1), found(attends.flatten())
        image = chosen // tokens.shape[1]
        mask = torch.zeros(1).masked_fill(image[:, None] != image, float("-inf"))
        return flat.index_copy(0, chosen, block(flat[None, chosen], attn_mask=mask)[0]).reshape(tokens.shape)

    def unpacked(self, block: nn.Module, tokens: torch.Tensor, attends: torch.Tensor) -> torch.Tensor:
        batch, count, width = tokens.shape
        flat, chosen, attention = tokens.flatten(0, 1), found(attends.flatten()), block.attn
        most = most_of(attends)
        rank = attends.to(torch.int64).cumsum(1).flatten()[chosen] - 1
        places = chosen // count * most + rank
        row = flat[chosen]
        mixed = attention.qkv(block.norm1(row))
        mixed = mixed.new_zeros(batch * most, 3 * width).index_copy(0, places, mixed)
        query, key, value = mixed.reshape(batch, most, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(query, key, value, attn_mask=behind(attends, most))
        row = row + block.ls1(attention.proj(heads.transpose(1, 2).reshape(batch * most, width)[places]))
        row = row + block.ls2(block.mlp(block.norm2(row)))
        return flat.index_copy(0, chosen, row).reshape(tokens.shape)

    def padded(self, block: nn.Module, tokens: torch.Tensor, attends: torch.Tensor) -> torch.Tensor:
        most = most_of(attends)
        order = attends.to(torch.int64).topk(tokens.shape[1]).indices[:, :most, None].expand(-1, -1, tokens.shape[2])
        before = tokens.gather(1, order)
        after = block(before, attn_mask=behind(attends, most))
        real = attends.gather(1, order[..., 0])[..., None]
        return tokens.scatter(1, order, torch.where(real, after, before))


def found(attends: torch.Tensor) -> torch.Tensor:
    """(N,), whether each token attends → the places of those that do."""
    chosen = attends.nonzero()[:, 0]
    torch._check(chosen.shape[0] >= 2)
    return chosen


def most_of(attends: torch.Tensor) -> int:
    """Tokens of the image that keeps the most."""
    most = attends.sum(1).max().item()
    torch._check(most >= 2)
    torch._check(most <= attends.shape[1])
    return most


def behind(attends: torch.Tensor, most: int) -> torch.Tensor:
    """(B, 1, 1, M) minus infinity for what pads an image."""
    absent = torch.arange(most) >= attends.sum(1, keepdim=True)
    return torch.zeros(1).masked_fill(absent, float("-inf"))[:, None, None]


WAYS = ("original", "alone", "row", "unpacked", "padded")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--photos", type=Path, help="folder to take scenes from; by default crops of the built-in ones")
    parser.add_argument("--batches", nargs="+", type=int, default=[2, 4, 8, 16])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/onnx_batches.json"))
    arguments = parser.parse_args()
    model = load("vit_small_patch14_dinov2", checkpoint=arguments.weights, img_size=224).eval()
    preprocessing = preprocessing_of(model)
    plan = find_plan(model, sample(None, preprocessing, 24)[0], BUDGET, adaptive=True).config
    with methods.scenes_of(arguments.photos) if arguments.photos else nullcontext(None) as folder:
        photos = sample(folder, preprocessing, max(arguments.batches))[0]
    tokens, attends = chosen_by(convert(copy.deepcopy(model), plan), photos)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = {way: exported(model.blocks, way, tokens, attends, Path(folder)) for way in WAYS}
        for threads in arguments.threads:
            sessions = {way: opened(file, threads) for way, file in files.items()}
            for batch in arguments.batches:
                speeds = measure(sessions, tokens[:batch], attends[:, :batch], threads, arguments.rounds)
                rows.append({"threads": threads, "batch": batch, **speeds})
                print(rows[-1], flush=True)
    record.write(arguments.out, {"plan": plan.model_dump(), "rows": rows})


def chosen_by(model: nn.Module, photos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens as they reach the first block, (B, N, D), and which of them attend in each layer, (L, B, N)."""
    seen = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        run(model, photos)
    hook.remove()
    batch, count, _ = seen[0].shape
    attends = torch.ones(len(model.blocks), batch * count, dtype=torch.bool)
    for layer, choice in last_choices(model).items():
        attends[layer - 1, choice.skipped[0]] = False
    return seen[0], attends.reshape(-1, batch, count)


def exported(blocks: nn.Sequential, way: str, tokens: torch.Tensor, attends: torch.Tensor, folder: Path) -> Path:
    several = 1 if way == "alone" else 2
    shapes = [{}, {}] if way == "alone" else [{0: (batch := torch.export.Dim("batch"))}, {1: batch}]
    example = (tokens[:several], attends[:, :several])
    file = folder / f"{way}.onnx"
    with torch.no_grad():
        program = torch.onnx.export(
            Blocks(copy.deepcopy(blocks), way),
            example,
            input_names=["tokens", "attends"],
            dynamic_shapes=shapes,
            dynamo=True,
        )
    program.save(file)
    return file


def opened(file: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def measure(sessions: dict, tokens: torch.Tensor, attends: torch.Tensor, threads: int, rounds: int) -> dict:
    """How many times as fast as the original each way is, by the median; all give the same tokens."""
    given = {"tokens": tokens.numpy(), "attends": attends.numpy()}
    each = [
        {"tokens": given["tokens"][at : at + 1], "attends": given["attends"][:, at : at + 1]}
        for at in range(len(tokens))
    ]

    def results(way: str) -> np.ndarray:
        return np.concatenate([sessions[way].run(None, of)[0] for of in (each if way == "alone" else [given])])

    expected = results("alone")
    for way in WAYS[2:]:
        np.testing.assert_allclose(results(way), expected, atol=1e-3, rtol=1e-3)
    with pinned(threads):
        timings = interleave({way: functools.partial(results, way) for way in sessions}, rounds)
    return {
        way: Timing(each.speedups(timings["original"])).median for way, each in timings.items() if way != "original"
    }


if __name__ == "__main__":
    main()
