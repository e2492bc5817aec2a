"""In half precision tokens are chosen, counted and averaged as in float32."""

import pytest
import torch
from conftest import lively
from families import FAMILIES

from tosa_convert import convert
from tosa_convert.methods.matching import choose_bipartite, choose_by_energy
from tosa_convert.methods.scores.received import Received
from tosa_convert.methods.token_ops import Choice, add_up, wide
from tosa_convert.models.adapter import run
from tosa_convert.models.families.transformers_mae import _sorted_noise

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("choose", [choose_bipartite, lambda *args: choose_by_energy(*args, margin=0.5)])
def test_who_is_merged_does_not_go_by_rounding(dtype, choose):
    """Found: with ties among many alike, ToMe took them from the top of the image."""
    torch.manual_seed(0)
    keys = (torch.randn(1, 1, 64) + 0.1 * torch.randn(1, 197, 64)).to(dtype)
    found, wanted = choose(keys, 1, 180), choose(keys.float(), 1, 180)
    assert torch.equal(found.skipped, wanted.skipped)
    assert torch.equal(found.partners, wanted.partners)


def test_attention_that_is_nearly_even_still_has_an_order():
    torch.manual_seed(0)
    queries, keys = (0.05 * torch.randn(1, 2, 197, 32).bfloat16() for _ in range(2))
    assert len(Received().read(queries, keys).unique()) > 300


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "options", [{"method": "tome"}, {"score": "similarity", "bypass": "merge"}, {"method": "mctf"}]
)
def test_large_groups_of_large_tokens_stay_finite(dtype, options):
    """Found: a plain image, half of whose tokens became one, overflowed in float16."""
    model = lively(FAMILIES["timm vit"]())
    with torch.no_grad():
        model.patch_embed.proj.bias[0] = 900.0
    model = convert(model, ratio=0.6, **options).to(dtype)
    found = run(model, torch.zeros(1, 3, 96, 96))
    assert all(value.isfinite().all() for value in found.values())


def test_many_tokens_are_counted_in_full():
    places = torch.arange(601)
    choice = Choice(places[None, :1], places[None, 1:], torch.zeros(1, 600, dtype=torch.long))
    (found,) = add_up(choice, wide(torch.ones(1, 601, 1, dtype=torch.bfloat16)))
    assert found.item() == 601


@pytest.mark.parametrize("dtype", HALVES)
def test_patches_of_mae_keep_their_order(dtype):
    noise = _sorted_noise(torch.zeros(1, 3, 512, 512, dtype=dtype), (8, 8))
    assert torch.equal(noise.argsort(dim=1), torch.arange(4096)[None])
