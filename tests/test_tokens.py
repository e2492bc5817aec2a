import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tosa_convert.methods.score import Acts, Site
from tosa_convert.methods.scores.random import RandomScore
from tosa_convert.methods.token_ops import (
    RATIO_STEPS,
    choose_best,
    gather_tokens,
    keep_count,
    random_rows,
    ratio_steps,
    rejoin_tokens,
    spread_rows,
)

batches = st.integers(1, 4)
patch_counts = st.integers(1, 40)
prefixes = st.integers(0, 5)
ratios = st.integers(1, RATIO_STEPS).map(lambda steps: steps / RATIO_STEPS)


@given(patches=st.integers(1, 100_000), ratio=ratios)
def test_keep_count_is_the_exact_ceiling(patches, ratio):
    kept = keep_count(patches, ratio_steps(ratio))
    assert 1 <= kept <= patches
    assert (kept - 1) * RATIO_STEPS < patches * ratio_steps(ratio) <= kept * RATIO_STEPS


@given(patches=st.integers(1, 10_000))
def test_ratio_one_keeps_everything(patches):
    assert keep_count(patches, ratio_steps(1.0)) == patches


@given(batch=batches, patches=patch_counts, prefix=prefixes, ratio=ratios, seed=st.integers(0, 99))
def test_top_tokens_are_the_prefix_and_the_best_patches(batch, patches, prefix, ratio, seed):
    scores = torch.randn(batch, prefix + patches, generator=torch.Generator().manual_seed(seed))
    positions = choose_best(scores, prefix, keep_count(patches, ratio_steps(ratio))).attended
    kept = keep_count(patches, ratio_steps(ratio))
    assert positions.shape == (batch, prefix + kept)
    for row, chosen in zip(scores, positions, strict=True):
        assert chosen[:prefix].tolist() == list(range(prefix))
        assert len(set(chosen.tolist())) == prefix + kept
        left_out = sorted(set(range(prefix + patches)) - set(chosen.tolist()))
        if left_out:
            assert row[chosen[prefix:]].min() >= row[left_out].max()


@given(batch=batches, patches=patch_counts, prefix=prefixes, ratio=ratios)
def test_ties_go_to_the_first_positions(batch, patches, prefix, ratio):
    positions = choose_best(
        torch.zeros(batch, prefix + patches), prefix, keep_count(patches, ratio_steps(ratio))
    ).attended
    assert (positions == torch.arange(positions.shape[1])).all()


@given(batch=batches, patches=patch_counts, width=st.integers(1, 8), ratio=ratios, seed=st.integers(0, 99))
def test_gather_then_rejoin_changes_just_the_chosen_rows(batch, patches, width, ratio, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, patches, width, generator=generator)
    positions = choose_best(
        torch.randn(batch, patches, generator=generator), 0, keep_count(patches, ratio_steps(ratio))
    ).attended
    picked = gather_tokens(tokens, positions)
    assert torch.equal(picked, tokens.gather(1, positions[..., None].expand(-1, -1, width)))
    assert torch.equal(rejoin_tokens(tokens, positions, picked), tokens)
    joined = rejoin_tokens(tokens, positions, picked + 1)
    changed = torch.zeros(batch, patches).scatter(1, positions, 1.0)[..., None]
    assert torch.equal(joined, tokens + changed)


def test_rejoin_passes_gradients_to_both_sides():
    tokens = torch.randn(2, 5, 3, requires_grad=True)
    positions = torch.tensor([[0, 2], [4, 1]])
    updated = torch.randn(2, 2, 3, requires_grad=True)
    rejoin_tokens(tokens, positions, updated).sum().backward()
    assert (updated.grad == 1).all()
    assert tokens.grad.sum() == 2 * 3 * 3


def random_score(seed: int, layer: int) -> RandomScore:
    score = RandomScore()
    score.setup(Site(layer, heads=3, prefix=1, width=48, acts=Acts.AROUND, seed=seed))
    return score


@given(seed=st.integers(0, 1000), layer=st.integers(2, 40), tokens=st.integers(20, 400))
def test_random_scores_are_an_order_without_many_ties(seed, layer, tokens):
    maps = torch.zeros(2, 3, tokens, 4)
    scores = random_score(seed, layer).read(maps, maps)
    assert scores.shape == (2, 3, tokens)
    assert torch.equal(scores[0], scores[1])
    assert all(len(order.unique()) == tokens for order in scores[0])
    assert len(scores[0].sum(0).unique()) > 0.9 * tokens
    assert torch.equal(scores, random_score(seed, layer).read(maps, maps))
    assert not torch.equal(scores, random_score(seed, layer + 1).read(maps, maps))


def test_random_scores_choose_every_position_alike():
    maps = torch.zeros(1, 3, 50, 4)
    counts = torch.zeros(50)
    for seed in range(400):
        counts[choose_best(random_score(seed, 2).read(maps, maps).sum(1), 0, 25).attended[0]] += 1
    assert counts.min() > 140
    assert counts.max() < 260


@given(tokens=st.integers(3, 1500), prefix=st.integers(0, 5), rows=st.integers(2, 64))
def test_rows_that_stand_for_all_are_within_and_spread(tokens, prefix, rows):
    tokens += prefix + rows
    for choose in (spread_rows, random_rows):
        chosen = choose(tokens, prefix, rows)
        assert len(chosen) == rows
        assert (chosen[0] == 0) == (prefix > 0) or prefix == 0
        patches = chosen[1:] if prefix else chosen
        assert patches.min() >= prefix
        assert patches.max() < tokens
    assert len(random_rows(tokens, prefix, rows).unique()) == rows


@pytest.mark.parametrize("side", [14, 16, 24, 37])
def test_spread_rows_cover_the_grid_in_both_directions(side):
    """Every quarter of the columns and every quarter of the rows gets its share of 32 query rows; a plain
    stride of 8 on a grid of 16 would meet two columns."""
    patches = spread_rows(side * side + 1, 1, 32)[1:] - 1
    for place in (patches // side, patches % side):
        counts = torch.bincount(place * 4 // side, minlength=4)
        assert counts.min() >= 6
        assert counts.max() <= 10
    assert len(patches.unique()) == 31


@given(tokens=st.integers(40, 1500), prefix=st.integers(0, 5), rows=st.integers(2, 40))
def test_rows_of_a_symbolic_number_of_tokens_are_the_same(tokens, prefix, rows):
    symbolic = torch.tensor(tokens)
    assert torch.equal(spread_rows(symbolic, prefix, rows), spread_rows(tokens, prefix, rows))
