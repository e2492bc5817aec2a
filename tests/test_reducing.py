"""Layers after which tokens are gone, on every family, against the original's own blocks and loops over tokens; where a
bypass is not for a family, the refusal says why."""

import copy
import functools
import math
from itertools import product

import numpy as np
import pytest
import torch
from conftest import lively
from families import CORE, FAMILIES, HF_SMALL
from hypothesis import given
from hypothesis import strategies as st
from references import close, first
from test_bypasses import _groups, _own_forward, built, photos
from timm.layers import DiffAttention
from timm.models.cait import TalkingHeadAttn
from transformers import BeitConfig, BeitForSemanticSegmentation

from tosa_convert import UnsupportedModelError, UsageError, convert
from tosa_convert.methods.bypass import Bypass
from tosa_convert.methods.parts import every
from tosa_convert.methods.score import Acts
from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.models.relative_bias import RelativeAdapter, mean_bias
from tosa_convert.selective.selection import last_choices, selective_blocks

REDUCING = [name for name, part in every(Bypass).items() if part.acts is not Acts.AROUND]
CASES = [*((name, {}) for name in REDUCING), ("pool", {"attention": "precise"})]
NEAR_OTHERS = [("local_mean", {}), ("average", {}), ("pool", {"attention": "precise"})]
"""What differs little from another bypass, so that the core families are enough by default."""
SCORE = {"fuse": "class_attention", "pool": "multi_criteria", "local_mean": "received"}
"""Where the bypass needs a certain one; similarity otherwise."""
NOT_CLAIMED = {
    "layers with windows in between": {"hf SAM", "hf ViTDet", "timm sam"},
    "as a module each": {"timm parallel", "timm parallel things", "timm diff parallel", "hf YolosModel"},
}
"""Why a bypass after which tokens are gone is not for a family, and which these are."""
BY_CLASS_TOKEN = {"needs a class token": "class_token", "by their class token": "classifies_by_class_token"}
"""Why it is not for models without, and what they are without."""


@pytest.mark.parametrize(
    ("name", "bypass", "how"),
    [
        pytest.param(name, *case, marks=[pytest.mark.long] if case in NEAR_OTHERS and name not in CORE else [])
        for case in CASES
        for name in FAMILIES
    ],
)
def test_it_equals_the_originals_blocks_with_loops(name, bypass, how):
    """Or it says which property of the family it is not for."""
    model, images = built(name), photos()
    options = {"score": SCORE.get(bypass, "similarity"), "bypass": bypass, "layers": {2: 0.7, 4: 0.5}, **how}
    try:
        converted = convert(copy.deepcopy(model), **options)
    except (UsageError, UnsupportedModelError) as error:
        refusal, families = str(error), [names for reason, names in NOT_CLAIMED.items() if reason in str(error)]
        lacking = [what for reason, what in BY_CLASS_TOKEN.items() if reason in refusal]
        assert len(families) + len(lacking) == 1, refusal
        assert all(name in names for names in families), refusal
        assert not any(getattr(adapter_of(model), what) for what in lacking), refusal
        return
    weights = {}
    for block in selective_blocks(converted):
        layer = block.selection.layer

        def note(selector, given, output, layer=layer):
            weights.setdefault(layer, output)

        block.selector.register_forward_hook(note)
    found = run(converted, images)
    choices = last_choices(converted)
    reference = copy.deepcopy(model)
    grid = selective_blocks(converted)[0].selection.current.last.grid
    _Reference(adapter_of(reference), bypass, how, choices, weights if bypass == "fuse" else {}, grid).spell_out()
    for output, value in run(reference, images).items():
        assert close(found[output], value), output
    assert not torch.allclose(first(found), first(run(model, images)), atol=1e-3)


@given(st.integers(1, 4), st.integers(1, 3), st.data())
def test_the_bias_between_groups_is_the_mean_over_pairs(count, batch, data):
    members = torch.tensor(
        [data.draw(st.permutations([*range(count), *data.draw(st.lists(st.integers(0, count - 1), max_size=4))]))]
    ).expand(batch, -1)
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(1, 2, members.shape[1], members.shape[1], generator=generator)
    found = mean_bias(bias, members, count)
    for image, one, other in product(range(batch), range(count), range(count)):
        pairs = bias[0][:, members[image] == one][:, :, members[image] == other]
        assert torch.allclose(found[image, :, one, other], pairs.mean((1, 2)), atol=1e-6)


class _Reference:
    """Each image by itself, its tokens a list of groups of the image's tokens; every token leaves every layer."""

    def __init__(self, adapter, bypass: str, how: dict, choices: dict, weights: dict, grid):
        self.adapter, self.bypass, self.choices, self.weights = adapter, bypass, choices, weights
        self.ahead = bypass == "pool" and not how
        self.windows, self.grid = how.get("windows", 2), grid
        self.members: list[list[list[int]]] = []

    def spell_out(self) -> None:
        for layer, block in enumerate(self.adapter.blocks, start=1):
            block.forward = self._spelt_out(layer, block)

    def _spelt_out(self, layer: int, block):
        own, adapter = _own_forward(self.adapter, block), self.adapter

        def forward(*args, **kwargs):
            entering, args, kwargs = adapter.entering(args, kwargs)
            tokens = adapter.taken(entering) if self.bypass != "drop" or layer == 1 else entering
            if layer == 1:
                self.members = [[[place] for place in range(tokens.shape[1])] for _ in tokens]
            rows = [self._one(layer, block, own, image, tokens[image], args, kwargs) for image in range(len(tokens))]
            if self.bypass == "drop":
                return adapter.given_back(torch.stack(rows))
            whole = torch.stack([self._put_back(image, row) for image, row in enumerate(rows)])
            return adapter.given_back(adapter.restored(whole, entering))

        return forward

    def _one(self, layer: int, block, own, image: int, tokens: torch.Tensor, args, kwargs) -> torch.Tensor:
        """What is left of an image after a layer."""
        adapter = self.adapter
        attention = adapter.attention(block)
        attention_branch, mlp_branch = adapter.branches(block)
        if self.bypass != "drop":
            tokens = tokens[[group[0] for group in self.members[image]]]

        def call(tokens, sized=True):
            places = torch.tensor([[group[0] for group in self.members[image]]])
            sizes = torch.tensor([[float(len(group)) for group in self.members[image]]])
            sizes = sizes if self.bypass in ("persist", "pool") and sized else None
            joined = {}
            if isinstance(adapter, RelativeAdapter) and self.bypass not in ("drop", "local_mean"):
                where = {place: index for index, group in enumerate(self.members[image]) for place in group}
                joined["members"] = torch.tensor([[where[place] for place in sorted(where)]])
            return adapter.call(block, own, tokens[None], args, kwargs, places, sizes, **joined)[0]

        if layer not in self.choices:
            return call(tokens)
        if self.bypass == "pool":
            heads = self._fused(layer, image, attention, tokens, call) if self.ahead else None
            tokens = self._reduced(layer, image, tokens)
            if heads is None:
                return call(tokens)
            attention.forward = lambda hidden=None, *_, **named: adapter.finish(
                attention, heads.flatten(1)[None], named.get("hidden_states", hidden)
            )
            tokens = call(tokens, sized=False)
            del attention.forward
            return tokens
        tokens = self._without(mlp_branch, call, tokens)
        tokens = self._reduced(layer, image, tokens)
        return self._without(attention_branch, functools.partial(call, sized=False), tokens)

    def _without(self, branch, call, tokens: torch.Tensor) -> torch.Tensor:
        for module, answer in branch:
            module.forward = answer
        after = call(tokens)
        for module, _ in branch:
            del module.forward
        return after

    def _fused(self, layer: int, image: int, attention, tokens, call) -> torch.Tensor:
        """What the heads give for each group, (K, H, D), from the whole map of attention."""
        adapter, caught = self.adapter, []

        def catch(*args, **kwargs):
            normed = args[0] if args else kwargs["hidden_states"]
            caught.extend([*adapter.project(attention, normed, kwargs), adapter.bias(attention, kwargs)])
            return adapter.as_attention_output(torch.zeros_like(normed))

        attention.forward = catch
        call(tokens, sized=False)
        del attention.forward
        queries, keys, values, bias = caught
        sizes = torch.tensor([float(len(group)) for group in self.members[image]])
        logits = queries @ keys.mT * adapter.scale(queries) + (0 if bias is None else bias)
        if isinstance(attention, TalkingHeadAttn):
            logits = attention.proj_l(logits.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        maps = (logits + sizes.log()).softmax(-1)[0]
        if isinstance(attention, TalkingHeadAttn):  # whose constant counts once for each token
            maps = torch.einsum("gh,hqk->gqk", attention.proj_w.weight, maps)
            maps = maps + attention.proj_w.bias[:, None, None] * sizes
        if isinstance(attention, DiffAttention):
            maps = maps[0::2] - attention._compute_lambda() * maps[1::2]
        groups = list(_groups(self.choices[layer], image).values())
        rows = [self._mean(layer, image, places, maps.transpose(0, 1)) for places in groups]  # (K, H, N)
        fused = torch.stack([torch.stack(rows)[..., places].sum(-1) for places in groups], dim=-1)  # (K, H, K)
        means = torch.stack([self._mean(layer, image, places, values[0].transpose(0, 1)) for places in groups])
        return torch.einsum("khg,ghd->khd", fused, means)

    def _reduced(self, layer: int, image: int, tokens: torch.Tensor) -> torch.Tensor:
        choice, members = self.choices[layer], self.members[image]
        attended, skipped = choice.attended[image].tolist(), choice.skipped[image].tolist()
        kept = [members[place] for place in attended]
        if self.bypass == "drop":
            self.members[image] = kept
            return tokens[attended]
        if self.bypass == "fuse":
            shares = self.weights[layer][image].mean(0)
            fused = sum(tokens[place] * shares[place] for place in skipped)
            self.members[image] = [*kept, [part for place in skipped for part in members[place]]]
            return torch.cat([tokens[attended], fused[None]])
        if self.bypass == "local_mean":
            return self._windowed(layer, image, tokens, attended, skipped)
        rows = [self._mean(layer, image, places, tokens) for places in _groups(choice, image).values()]
        joined = [[part for place in places for part in members[place]] for places in _groups(choice, image).values()]
        self.members[image] = joined
        return torch.stack(rows)

    def _windowed(
        self, layer: int, image: int, tokens: torch.Tensor, attended: list[int], skipped: list[int]
    ) -> torch.Tensor:
        """One token more for each window, of those skipped in it; the same as that of the best where there are none."""
        members, lengths, first = self.members[image], self.grid, layer == min(self.choices)
        kept, prefix = [members[place] for place in attended], 1 + max(map(max, members)) - math.prod(lengths)
        side = self.windows if first else 1

        def window(place):
            at = np.unravel_index(members[place][0] - prefix, lengths)
            return tuple(here * side // length for here, length in zip(at, lengths, strict=True))

        found, means = [], []
        for at in product(range(side), repeat=len(lengths)):
            inside = [place for place in skipped if window(place) == at]
            inside = inside or [place for place in skipped if window(place) == window(skipped[0])]
            parts = list(dict.fromkeys(part for place in inside for part in members[place]))
            found.append(parts)
            own = {part: place for place in inside for part in members[place]}
            means.append(torch.stack([tokens[own[part]] for part in parts]).mean(0))
        self.members[image] = [*kept, *found]
        return torch.cat([tokens[attended], torch.stack(means)])

    def _mean(self, layer: int, image: int, places: list[int], rows: torch.Tensor) -> torch.Tensor:
        """Of one group, by how much each of its tokens counts."""
        weights = torch.tensor([float(len(self.members[image][place])) for place in places])
        if self.bypass == "pool":
            weights = weights * self.choices[layer].weights[image][places]
        shape = (-1, *[1] * (rows.ndim - 1))
        return (rows[places] * weights.view(shape)).sum(0) / weights.sum()

    def _put_back(self, image: int, tokens: torch.Tensor) -> torch.Tensor:
        result = torch.empty(1 + max(map(max, self.members[image])), tokens.shape[1])
        for token, group in zip(tokens, self.members[image], strict=True):
            result[group] = token
        return result


def test_a_head_that_reads_several_layers_gets_every_token():
    """BEiT's own for segmentation."""
    config = BeitConfig(
        **HF_SMALL, out_indices=[1, 2, 3, 4], pool_scales=[1, 2], num_labels=3, use_relative_position_bias=True
    )
    model = lively(BeitForSemanticSegmentation(config))
    wanted = first(run(model, photos()))
    for bypass in REDUCING:
        if bypass != "drop":
            converted = convert(
                copy.deepcopy(model), score=SCORE.get(bypass, "similarity"), bypass=bypass, layers={2: 0.7, 4: 0.5}
            )
            found = first(run(converted, photos()))
            assert found.shape == wanted.shape
            assert not torch.equal(found, wanted)


def test_each_bypass_is_claimed_by_several_families():
    """So that the test above does not pass because everything is refused."""
    for bypass in REDUCING:
        taken = []
        for name in CORE:
            try:
                convert(FAMILIES[name](), score=SCORE.get(bypass, "similarity"), bypass=bypass, layers={2: 0.7})
                taken.append(name)
            except (UsageError, UnsupportedModelError):
                continue
        assert len(taken) >= 2, (bypass, taken)
