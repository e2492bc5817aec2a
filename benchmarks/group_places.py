"""Where a group of merged tokens stands: where the token stands that the others joined, as tosa-convert has it in
models of rotary positions, or in the mean of all their places, as it has it in models of a bias per pair of places (the
mean over all pairs of the places of two groups).

    python benchmarks/train_fashion_vit.py --data /usr/share/datasets/fashion-mnist --out rotary \\
        --model vit_small_patch16_rope_224 --epochs 9
    python benchmarks/group_places.py rotary --data /usr/share/datasets/fashion-mnist \\
        --out benchmarks/results/rotary_groups.json
    python benchmarks/train_fashion_vit.py --data /usr/share/datasets/fashion-mnist --out biased \\
        --model beit_base_patch16_224 --epochs 9
    python benchmarks/group_places.py biased --data /usr/share/datasets/fashion-mnist \\
        --out benchmarks/results/biased_groups.json

The models know of places by rotation or by their biases alone. Top-1 on all 10,000 test images of Fashion-MNIST without
training after the conversion, and the mean Kullback–Leibler divergence to the original's output. Takes ten minutes on
one core, and the training half an hour or an hour.
"""

import argparse
import contextlib
from pathlib import Path
from unittest import mock

import record
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from train_fashion_vit import normalise, read_idx

from tosa_convert import UsageError, load
from tosa_convert.measure.macs import count_macs
from tosa_convert.methods import bypass
from tosa_convert.methods.bypasses import persist, pool
from tosa_convert.models.adapter import adapter_of
from tosa_convert.models.families.timm_eva import TimmEva
from tosa_convert.models.relative_bias import RelativeAdapter
from tosa_convert.planning.budget import at_budget
from tosa_convert.selective import reducing_block

METHODS = ("tome", "similarity/persist/constant", "mctf")
BUDGETS = (0.8, 0.65)
BATCH = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model = load(arguments.model).eval()
    images, labels = read_idx(arguments.data, "t10k")
    wanted = outputs(model, images)
    rows = []
    for budget in BUDGETS:
        for name in METHODS:
            try:
                converted = at_budget(model, name, budget)
            except UsageError as error:
                print(f"{name} at {budget}: {error}")
                continue
            row = {"method": name, "budget": budget, "macs": count_macs(converted) / count_macs(model)}
            for kind in ("representative", "mean"):
                with standing(converted, kind):
                    given = outputs(converted, images)
                row[kind] = {"top1": top1(given, labels), "kl": divergence(given, wanted)}
            rows.append(row)
            print(row, flush=True)
            record.write(arguments.out, {"images": len(images), "original": top1(wanted, labels), "rows": rows})


@torch.inference_mode()
def outputs(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(normalise(part)) for part in images.split(BATCH)])


def top1(given: torch.Tensor, labels: torch.Tensor) -> float:
    return (given.argmax(-1) == labels).float().mean().item()


def divergence(given: torch.Tensor, wanted: torch.Tensor) -> float:
    return F.kl_div(given.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean").item()


@contextlib.contextmanager
def standing(model: nn.Module, kind: str):
    """Within this block groups stand where the one stands that the others joined, or in the mean of their places."""
    biased, members = isinstance(adapter_of(model), RelativeAdapter), WeakTensorKeyDictionary()

    def noted(choice, groups, sizes):
        after = bypass.merged(choice, groups, sizes)
        members[after.at] = after.places
        return after

    with contextlib.ExitStack() as patches:
        if biased and kind == "representative":
            patches.enter_context(mock.patch.object(reducing_block, "RelativeAdapter", ()))  # no members for the mean
        elif not biased and kind == "mean":
            patches.enter_context(mock.patch.object(persist, "merged", noted))
            patches.enter_context(mock.patch.object(pool, "merged", noted))
            patches.enter_context(mean_turns(model, members))
        yield


def mean_turns(model: nn.Module, members: WeakTensorKeyDictionary):
    angles, plain = angles_of(model), TimmEva.arguments

    def arguments(adapter, args, kwargs, places, sizes):
        args, kwargs = plain(adapter, args, kwargs, places, sizes)
        if places in members:
            angle = shares_of(members[places], places.shape[1])[:, adapter.prefix :, adapter.prefix :] @ angles
            kwargs = {**kwargs, "rope": torch.cat([angle.sin(), angle.cos()], dim=-1)[:, None]}
        return args, kwargs

    return mock.patch.object(TimmEva, "arguments", arguments)


def angles_of(model: nn.Module) -> torch.Tensor:
    """(N, D) by which patches turn: places times frequencies, which a step in each direction tells."""
    rows, columns = model.patch_embed.grid_size
    sines, cosines = model.rope.get_embed().unflatten(0, (rows, columns)).chunk(2, dim=-1)
    turned = torch.complex(cosines, sines)
    first, down, across = turned[0, 0], turned[1, 0], turned[0, 1]
    row, column = (torch.arange(count)[:, None] for count in (rows, columns))
    angles = first.angle() + (row * (down / first).angle())[:, None] + (column * (across / first).angle())[None]
    torch.testing.assert_close(torch.polar(torch.ones_like(angles), angles), turned, atol=1e-4, rtol=0)
    return angles.flatten(0, 1)


def shares_of(groups: torch.Tensor, count: int) -> torch.Tensor:
    """What each of all tokens has in the mean of its group, (B, K, N); ``groups`` (B, N) says which that is."""
    within = F.one_hot(groups, count).float().transpose(1, 2)
    return within / within.sum(-1, keepdim=True)


if __name__ == "__main__":
    main()
