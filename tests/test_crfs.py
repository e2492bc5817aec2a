"""NeWCRFs' head and the pyramid under it, against what they are worked out by hand."""

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tosa_convert.models.heads.newcrfs import WINDOW, WindowCrf, average, joined, window_mask, windowed
from tosa_convert.models.pyramid import Pyramid

sides = st.integers(1, 23)


@given(sides, sides, st.sampled_from([0, WINDOW // 2]))
def test_windows_fit_together_again(rows, columns, shift):
    part = torch.arange(2.0 * rows * columns * 3).reshape(2, rows, columns, 3)
    split = windowed(part, shift)
    assert split.shape[1:] == (WINDOW**2, 3)
    assert torch.equal(joined(split, rows, columns, shift), part)


@given(sides, sides, st.sampled_from([0, WINDOW // 2]))
def test_places_see_those_of_their_window_and_no_others(rows, columns, shift):
    """Of the windows that a map is cut into when the first ones are as much shorter as they are shifted."""
    at = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1)
    inside = torch.cat([at.float() + 1, torch.ones(rows, columns, 1)], -1)[None]  # 0 where it is padded
    windows = windowed(inside, shift)
    mask = window_mask(rows, columns, shift, torch.zeros(1))
    for places, seen in zip(windows, mask, strict=True):
        real = places[:, 2] > 0
        window = (places[:, :2] - 1 + (WINDOW - shift) % WINDOW) // WINDOW
        together = (window[:, None] == window[None]).all(-1)
        both = real[:, None] & real[None]
        assert torch.equal((seen == 0) & both, together & both)
        assert not ((seen == 0) & (real[:, None] ^ real[None])).any()


def test_a_step_equals_attention_worked_out_place_by_place():
    torch.manual_seed(0)
    step = WindowCrf(8, 2, WINDOW // 2).eval()
    features, prediction = torch.randn(2, 1, 9, 10, 8)
    found = step(features, prediction)
    queries, keys = step.queries_keys(step.norm_features(features)).chunk(2, dim=-1)
    values = step.values(step.norm_prediction(prediction))
    group = lambda row, column: ((row + 4) // WINDOW, (column + 4) // WINDOW)  # noqa: E731  windows shifted by 3
    sent = torch.zeros_like(prediction)
    for row in range(9):
        for column in range(10):
            mates = [(r, c) for r in range(9) for c in range(10) if group(r, c) == group(row, column)]
            for head in range(2):
                part = slice(4 * head, 4 * head + 4)
                logits = torch.stack([queries[0, row, column, part] @ keys[0, r, c, part] / 2 for r, c in mates])
                offsets = [(row - r + WINDOW - 1) * (2 * WINDOW - 1) + column - c + WINDOW - 1 for r, c in mates]
                weights = (logits + step.positions[offsets, head]).softmax(0)
                sent[0, row, column, part] = sum(
                    w * values[0, r, c, part] for w, (r, c) in zip(weights, mates, strict=True)
                )
    wanted = prediction + step.out(sent)
    wanted = wanted + step.mlp(step.norm_mlp(wanted))
    assert torch.allclose(found, wanted, atol=1e-5)


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 2, 3, 6]))
def test_averages_are_those_of_adaptive_pooling(rows, columns, parts):
    features = torch.randn(1, 2, rows, columns, generator=torch.Generator().manual_seed(rows))
    assert torch.allclose(average(features, parts), F.adaptive_avg_pool2d(features, parts), atol=1e-5)


def test_the_pyramid_has_four_scales():
    sizes = [each.shape[-2:] for each in Pyramid(8)([torch.randn(1, 8, 5, 6)] * 4)]
    assert sizes == [(20, 24), (10, 12), (5, 6), (3, 3)]
