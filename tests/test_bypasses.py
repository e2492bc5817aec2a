"""Every bypass on every family that it is for, against the original's own blocks and loops over tokens; where it is not
for a family, the refusal says why."""

import copy

import pytest
import torch
from conftest import lively
from families import FAMILIES, MOSTLY_LONG
from references import close, first, sizes_of

from tosa_convert import convert
from tosa_convert.methods.bypass import Bypass
from tosa_convert.methods.parts import every
from tosa_convert.methods.score import Acts
from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.models.subclassing import steer
from tosa_convert.selective.selection import last_choices, selective_blocks

AROUND = [name for name, part in every(Bypass).items() if part.acts is Acts.AROUND]
GROUPING = [name for name, part in every(Bypass).items() if part.groups]


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
@pytest.mark.parametrize("name", MOSTLY_LONG)
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
