"""Every bypass on every family that it is for, against the original's own blocks and loops over tokens; where it is not
for a family, the refusal says why."""

import copy

import pytest
import torch
from conftest import lively
from families import CORE, FAMILIES
from test_contract import close, first, sizes_of

from tosa_convert import UnsupportedModelError, UsageError, convert
from tosa_convert.methods.bypass import Bypass
from tosa_convert.methods.parts import every
from tosa_convert.methods.score import Acts
from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.models.subclassing import steer
from tosa_convert.selective.selection import last_choices, selective_blocks

AROUND = [name for name, part in every(Bypass).items() if part.acts is Acts.AROUND]
GROUPING = [name for name, part in every(Bypass).items() if part.groups]
BETWEEN = [name for name, part in every(Bypass).items() if part.acts is Acts.BETWEEN]
SCORE = {"fuse": "class_attention"}
"""Where the bypass needs a certain one; similarity otherwise."""
NOT_CLAIMED = (
    "gives feature maps",
    "rotary or relative positions",
    "needs a class token",
    "by their class token",
    "adds to the tokens by itself",
    "separate",
)
"""Why a bypass between attention and MLP is not for a family."""


def built(name: str):
    torch.manual_seed(0)
    return lively(FAMILIES[name]())


def photos(size=(32, 32)) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("bypass", AROUND)
@pytest.mark.parametrize("name", FAMILIES)
def test_around_a_block_it_equals_the_originals_with_loops(name, bypass):
    compare_with_loops(built(name), "similarity", bypass, (32, 32))


@pytest.mark.parametrize(
    ("score", "bypass", "size"),
    [
        ("norm", "borrow", (32, 32)),
        ("norm", "merge", (48, 32)),
        ("class_attention", "merge", (32, 32)),
        ("similarity", "merge", (48, 32)),
        ("similarity", "borrow", (48, 32)),
    ],
)
def test_so_it_does_with_partners_of_a_matcher_and_at_other_sizes(family, score, bypass, size):
    if score == "class_attention" and not adapter_of(family).class_token:
        pytest.skip("this family has no class token")
    if size not in sizes_of(family):
        pytest.skip("this family has one size")
    compare_with_loops(family, score, bypass, size)


@pytest.mark.parametrize("bypass", GROUPING)
@pytest.mark.parametrize("name", FAMILIES)
def test_so_do_layers_that_share_a_choice(name, bypass):
    compare_with_loops(built(name), "similarity", bypass, (32, 32), segment=[3, 1])


def compare_with_loops(model, score: str, bypass: str, size: tuple[int, int], **options) -> None:
    """Groups are averaged and weighed token by token, the block is the original's."""
    adapter_of(model).resize(size)
    images = photos(size)
    ratio = 0.3 if score == "similarity" else 0.6
    converted = convert(copy.deepcopy(model), layers=[2, 3, 4, 6], ratio=ratio, score=score, bypass=bypass, **options)
    found = run(converted, images)
    choices = last_choices(converted)
    reference = copy.deepcopy(model)
    for block in selective_blocks(converted):
        layer = block.selection.layer
        choice = choices[layer]
        if bypass != "identity" and choice.partners is None:
            choice = choice._replace(partners=_partners(converted, block, images))
        _spell_out(adapter_of(reference), layer, choice, bypass, block.selection.follows)
    for name, value in run(reference, images).items():
        assert close(found[name], value), name
    assert not torch.allclose(first(found), first(run(model, images)), atol=1e-3)


def _partners(converted, block, images):
    """The partners that the block's matcher gave, caught while it runs."""
    caught = []
    handle = block.matcher.register_forward_hook(lambda module, inputs, output: caught.append(output.partners))
    run(converted, images)
    handle.remove()
    return caught[0]


def _spell_out(adapter, layer: int, choice, bypass: str, follows: bool) -> None:
    block = adapter.blocks[layer - 1]
    own = _own_forward(adapter, block)

    def spelt_out(*args, **kwargs):
        entering, args, kwargs = adapter.entering(args, kwargs)
        tokens = adapter.taken(entering)
        result = tokens.clone()
        for image in range(len(tokens)):
            groups = _groups(choice, image) if bypass != "identity" else _alone(choice, image)
            merged = bypass == "merge"
            rows = [tokens[image, members if merged else members[:1]].mean(0) for members in groups.values()]
            taken = torch.stack(rows)[None]
            sizes = torch.tensor([[len(members) if merged else 1 for members in groups.values()]])
            norm = None if follows else adapter.norm(block)  # groups that go on are normed as tokens are
            if merged and norm is not None:
                means = [norm.forward(tokens[image, members]).mean(0) for members in groups.values()]
                norm.forward = lambda _, means=means: adapter.as_normed(torch.stack(means)[None])
            places = torch.tensor([list(groups)])
            update = adapter.call(block, own, taken, args, kwargs, places, sizes.float())[0] - taken[0]
            if norm is not None:
                norm.__dict__.pop("forward", None)
            for index, members in enumerate(groups.values()):
                result[image, members] = tokens[image, members] + update[index]
        return adapter.given_back(adapter.restored(result, entering))

    block.forward = spelt_out


def _own_forward(adapter, block):
    """The block's forward, to be called by the adapter on some of its tokens."""
    for module, method in adapter.steered(block):
        steer(module, method)
    forward = block.forward
    return lambda _, tokens, *args, **kwargs: forward(tokens, *args, **kwargs)


def _alone(choice, image: int) -> dict[int, list[int]]:
    return {place: [place] for place in choice.attended[image].tolist()}


def _groups(choice, image: int) -> dict[int, list[int]]:
    """Attending token → itself and those it stands in for."""
    attended, groups = choice.attended[image].tolist(), _alone(choice, image)
    for place, partner in zip(choice.skipped[image].tolist(), choice.partners[image].tolist(), strict=True):
        groups[attended[partner]].append(place)
    return groups


@pytest.mark.parametrize("bypass", BETWEEN)
@pytest.mark.parametrize("name", FAMILIES)
def test_between_the_halves_it_equals_the_originals_with_loops(name, bypass):
    """Or it says which property of the family it is not for."""
    model, images = built(name), photos()
    options = {"score": SCORE.get(bypass, "similarity"), "bypass": bypass, "layers": {2: 0.7, 4: 0.5}}
    try:
        converted = convert(copy.deepcopy(model), **options)
    except (UsageError, UnsupportedModelError) as error:
        refusal = str(error)
        assert any(reason in refusal for reason in NOT_CLAIMED), refusal
        return
    weights = {}
    for block in selective_blocks(converted):
        layer = block.selection.layer
        block.selector.register_forward_hook(lambda _, __, output, layer=layer: weights.update({layer: output}))
    found = run(converted, images)
    choices = last_choices(converted)
    reference = copy.deepcopy(model)
    _Halves(adapter_of(reference), bypass, choices, weights if bypass == "fuse" else {}).spell_out()
    for output, value in run(reference, images).items():
        assert close(found[output], value), output
    assert not torch.allclose(first(found), first(run(model, images)), atol=1e-3)


class _Halves:
    """The reference: each image by itself, its tokens a list of groups of the image's tokens."""

    def __init__(self, adapter, bypass: str, choices: dict, weights: dict):
        self.adapter, self.bypass, self.choices, self.weights = adapter, bypass, choices, weights
        self.members: list[list[list[int]]] = []

    def spell_out(self) -> None:
        for layer, block in enumerate(self.adapter.blocks, start=1):
            block.forward = self._spelt_out(layer, block)

    def _spelt_out(self, layer: int, block):
        own, last = _own_forward(self.adapter, block), layer == len(self.adapter.blocks)
        attention, mlp = self.adapter.attention(block), self.adapter.mlp(block)

        def forward(tokens, *args, **kwargs):
            if layer == 1:
                self.members = [[[place] for place in range(tokens.shape[1])] for _ in tokens]
            rows = []
            for image in range(len(tokens)):
                one = tokens[image : image + 1]
                sizes = torch.tensor([[float(len(group)) for group in self.members[image]]])
                sizes = sizes if self.bypass == "persist" else None
                mlp.forward = lambda hidden, **_: torch.zeros_like(hidden)
                one = self.adapter.call(block, own, one, args, kwargs, sizes=sizes)[0]
                del mlp.forward
                if layer in self.choices:
                    one = self._reduced(layer, image, one)
                attention.forward = lambda hidden=None, *_, **named: self.adapter.as_attention_output(
                    torch.zeros_like(named.get("hidden_states", hidden))
                )
                one = own(block, one[None], *args, **kwargs)[0]
                del attention.forward
                rows.append(self._put_back(image, one) if last and self.bypass != "drop" else one)
            return torch.stack(rows)

        return forward

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
        rows, joined = [], []
        for places in _groups(choice, image).values():
            weights = torch.tensor([float(len(members[place])) for place in places])[:, None]
            rows.append((tokens[places] * weights).sum(0) / weights.sum())
            joined.append([part for place in places for part in members[place]])
        self.members[image] = joined
        return torch.stack(rows)

    def _put_back(self, image: int, tokens: torch.Tensor) -> torch.Tensor:
        result = torch.empty(sum(map(len, self.members[image])), tokens.shape[1])
        for token, group in zip(tokens, self.members[image], strict=True):
            result[group] = token
        return result


def test_each_bypass_between_the_halves_is_claimed_by_several_families():
    """So that the test above does not pass because everything is refused."""
    for bypass in BETWEEN:
        taken = []
        for name in CORE:
            try:
                convert(FAMILIES[name](), score=SCORE.get(bypass, "similarity"), bypass=bypass, layers={2: 0.7})
                taken.append(name)
            except (UsageError, UnsupportedModelError):
                continue
        assert len(taken) >= 2, (bypass, taken)
