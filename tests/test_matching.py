"""Who stands in for whom: against plain loops, on any grid."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from tosa_convert.methods.matching import (
    FEWEST,
    SKETCHED,
    choose_bipartite,
    choose_both_ways,
    choose_by_energy,
    choose_redundant,
    match,
    pyramid,
    sketch,
    thinnings,
)
from tosa_convert.methods.token_ops import Choice, add_up, choose_best, keep_count, ratio_steps, stand_ins

sides = st.integers(1, 9)
seeds = st.integers(0, 99)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(height=sides, width=sides, levels=st.integers(1, 5))
def test_a_pyramid_thins_out_the_grid_evenly(height, width, levels):
    grid = pyramid((height, width), levels)
    assert sorted(grid.order.tolist()) == list(range(height * width))
    assert len(grid.counts) == levels
    for level, count in enumerate(grid.counts):
        step = 2 ** ((level + 1) // 2)
        kept = {(row, column) for row in range(0, height, step) for column in range(0, width, step)}
        if level % 2 == 0:
            kept = {(row, column) for row, column in kept if (row // step + column // step) % 2 == 0}
        assert {divmod(position, width) for position in grid.order[:count].tolist()} == kept
        # Every patch has one that stays within a few steps of the grid.
        assert all(
            min(abs(r - a) + abs(c - b) for a, b in kept) < 3 * step for r in range(height) for c in range(width)
        )


@given(height=sides, width=sides, most=st.integers(1, 81))
def test_a_pyramid_goes_down_to_what_is_asked_for(height, width, most):
    assert pyramid((height, width), 1, most).counts[-1] <= most


@given(
    height=sides,
    width=sides,
    prefix=st.integers(0, 3),
    batch=st.integers(1, 3),
    ratio=st.floats(0.05, 1.0),
    seed=seeds,
)
def test_redundant_tokens_are_those_with_the_nearest_stand_ins(height, width, prefix, batch, ratio, seed):
    patches, steps = height * width, ratio_steps(ratio)
    kept = keep_count(patches, steps)
    grid = pyramid((height, width), thinnings(steps), kept)
    features = random(batch, prefix + patches, 3, seed=seed).double()
    choice = choose_redundant(features, prefix, grid, kept)
    for image in range(batch):
        attended, skipped = choice.attended[image].tolist(), choice.skipped[image].tolist()
        assert attended[:prefix] == list(range(prefix))
        assert sorted(attended + skipped) == list(range(prefix + patches))
        assert len(attended) == prefix + kept
        cost = _costs(features[image, prefix:], grid)
        assert {place - prefix for place in skipped} == set(sorted(cost, key=cost.get)[: patches - kept])
        for place, partner in zip(skipped, choice.partners[image].tolist(), strict=True):
            distances = [(features[image, place] - features[image, other]).norm().item() for other in attended[prefix:]]
            assert distances[partner - prefix] == min(distances)


def _costs(patches: torch.Tensor, grid) -> dict:
    """Of each patch that is not of the coarsest level: the squared distance to the nearest one that outlives it."""
    cost, order = {}, grid.order.tolist()
    for finer, count in zip([len(order), *grid.counts], grid.counts, strict=False):
        for place in order[count:finer]:
            cost[place] = min((patches[place] - patches[other]).square().sum().item() for other in order[:count])
    return cost


@given(times=st.integers(1, 5), height=st.integers(1, 5), width=st.integers(1, 5), levels=st.integers(1, 6))
def test_so_does_one_of_three_axes(times, height, width, levels):
    """A checkerboard in all, every second time and a checkerboard in space, one of each 2×2×2 block, and so on."""
    sides = (times, height, width)
    grid = pyramid(sides, levels)
    assert sorted(grid.order.tolist()) == list(range(times * height * width))
    everyone = list(itertools.product(*map(range, sides)))
    for level, count in enumerate(grid.counts):
        step, kind = 2 ** (level // 3), level % 3
        divided = [tuple(place // step for place in each) for each in everyone if not any(p % step for p in each)]
        kept = {
            0: {each for each in divided if sum(each) % 2 == 0},
            1: {each for each in divided if each[0] % 2 == 0 and (each[1] + each[2]) % 2 == 0},
            2: {each for each in divided if not any(place % 2 for place in each)},
        }[kind]
        found = {everyone[position] for position in grid.order[:count].tolist()}
        assert found == {tuple(place * step for place in each) for each in kept}


@given(prefix=st.integers(0, 3), patches=st.integers(1, 20), gone=st.integers(0, 10), seed=seeds)
def test_bipartite_matching_is_tomes(prefix, patches, gone, seed):
    """Written out from the paper's section 3.2, over all tokens, with the prefix tokens held back."""
    count = prefix + patches
    keys = random(2, count, 4, seed=seed).double()
    first = [place for place in range(0, count, 2) if place >= prefix]
    second = [place for place in range(1, count, 2) if place >= prefix]
    gone = min(gone, len(first)) if second else 0
    choice = choose_bipartite(keys, prefix, patches - gone)
    for image in range(2):
        unit = keys[image] / keys[image].norm(dim=-1, keepdim=True)
        best = {a: max(second, key=lambda b: (unit[a] @ unit[b]).item(), default=a) for a in first}
        order = sorted(first, key=lambda a: -(unit[a] @ unit[best[a]]).item())
        wanted = [*range(prefix), *sorted(order[gone:]), *second]
        assert choice.attended[image].tolist() == wanted
        assert choice.skipped[image].tolist() == order[:gone]
        assert [wanted[index] for index in choice.partners[image].tolist()] == [best[a] for a in order[:gone]]


@given(prefix=st.integers(0, 3), patches=st.integers(2, 20), seed=seeds)
def test_partners_are_the_nearest_attended_patches(prefix, patches, seed):
    features = random(2, prefix + patches, 5, seed=seed).double()
    choice = match(features, prefix, choose_best(random(2, prefix + patches, seed=seed + 1), prefix, patches // 2))
    for image in range(2):
        attended = choice.attended[image]
        distances = torch.cdist(features[image, choice.skipped[image]], features[image, attended[prefix:]])
        assert choice.partners[image].tolist() == (distances.argmin(1) + prefix).tolist()


@given(batch=st.integers(1, 3), patches=st.integers(1, 20), kept=st.integers(1, 20), seed=seeds)
def test_everyone_has_a_stand_in_and_is_counted_once(batch, patches, kept, seed):
    kept = min(kept, patches)
    choice = choose_best(random(batch, patches, seed=seed), 0, kept)
    generator = torch.Generator().manual_seed(seed)
    choice = choice._replace(partners=torch.randint(kept, choice.skipped.shape, generator=generator))
    groups = stand_ins(choice)
    for image in range(batch):
        for index, place in enumerate(choice.attended[image].tolist()):
            assert groups[image, place] == index
        for index, place in enumerate(choice.skipped[image].tolist()):
            assert groups[image, place] == choice.partners[image, index]
    tokens = random(batch, patches, 2, seed=seed).double()
    (sums,) = add_up(choice, tokens)
    for image in range(batch):
        for group in range(kept):
            assert torch.allclose(sums[image, group], tokens[image, groups[image] == group].sum(0))


def test_a_sketch_keeps_distances_roughly():
    """A random projection: squared distances are right on average, whatever the width; what they cost is a small share
    of a layer's 12 D² a token."""
    for width in (48, 100, 192, 384, 768, 1024):
        tokens = random(1, 60, width)
        pairs = torch.triu_indices(60, 60, 1)
        exact, rough = (torch.cdist(each, each)[0, pairs[0], pairs[1]].square() for each in (tokens, sketch(tokens)))
        assert sketch(tokens).shape[-1] <= max(2 * FEWEST, 2 * width**2 / SKETCHED)
        assert abs((rough / exact).mean() - 1) < 0.15
        assert (rough / exact).std() < 0.3


def test_energy_skips_nobody_where_all_are_kept():
    choice = choose_by_energy(random(2, 17, 3), 1, 16, 0.5)
    assert choice.attended.tolist() == [list(range(17))] * 2
    assert choice.skipped.shape == choice.partners.shape == (2, 0)


def test_nobody_is_skipped_at_ratio_one():
    grid = pyramid((4, 4), thinnings(ratio_steps(1.0)))
    choice = choose_redundant(random(1, 17, 3), 1, grid, 16)
    assert isinstance(choice, Choice)
    assert choice.skipped.shape == choice.partners.shape == (1, 0)


@given(
    patches=st.integers(2, 24), prefix=st.integers(0, 3), batch=st.integers(1, 3), share=st.floats(0, 0.5), seed=seeds
)
def test_both_ways_the_heaviest_pairs_go_first(patches, prefix, batch, share, seed):
    surplus = int(share * patches)
    weights = random(batch, (patches + 1) // 2, patches // 2, seed=seed).exp()
    choice = choose_both_ways(weights, prefix, patches - surplus)
    for image in range(batch):
        group = {place: place for place in range(patches)}  # who stands in for whom
        ones, others = list(range(0, patches, 2)), list(range(1, patches, 2))

        def weight(one, other, image=image):
            return weights[image, one // 2, other // 2].item()

        best = {one: max(others, key=lambda other, one=one: weight(one, other)) for one in ones}
        gone = sorted(ones, key=lambda one: -weight(one, best[one]))[: surplus - surplus // 2]
        group |= {one: best[one] for one in gone}
        left = [one for one in ones if one not in gone]
        if surplus // 2:
            best = {other: max(left, key=lambda one, other=other: weight(one, other)) for other in others}
            back = sorted(others, key=lambda other: -weight(best[other], other))[: surplus // 2]
            group |= {other: best[other] for other in back}
        root = {place: group[group[place]] for place in group}
        attended = choice.attended[image].tolist()
        assert attended == [*range(prefix), *(place + prefix for place in range(patches) if root[place] == place)]
        found = zip(choice.skipped[image].tolist(), choice.partners[image].tolist(), strict=True)
        assert {place - prefix: attended[into] - prefix for place, into in found} == {
            place: into for place, into in root.items() if place != into
        }


@given(prefix=st.integers(0, 3), batch=st.integers(1, 3))
def test_one_patch_stays(prefix, batch):
    tokens = random(batch, prefix + 1, 4)
    for choice in (
        choose_bipartite(tokens, prefix, 1),
        choose_by_energy(tokens, prefix, 1, 0.5),
        choose_both_ways(random(batch, 1, 0), prefix, 1),
    ):
        assert choice.attended.tolist() == [list(range(prefix + 1))] * batch
        assert choice.skipped.shape == (batch, 0)
