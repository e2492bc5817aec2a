"""Work out how an attention module attends: try what its parts could be until its own output comes out."""

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from tosa_convert.models.proof.calls import Call, NotProvenError, alike
from tosa_convert.models.proof.positions import candidates, named, names_of, read, turned
from tosa_convert.models.proof.structure import Heads

HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads")
SCALES = ("scale", "scaling", "softmax_scale")


def work_out(attention: nn.Module, call: Call, counts: tuple[int, ...], where: str) -> Heads:
    """How the attention module comes from the tokens to its output.

    Args:
        call: one of its calls.
        counts: of tokens that may have positions.
        where: its class and place, for messages.

    Raises:
        NotProvenError: nothing that was tried gives the module's own output.
    """
    tokens, wanted = call.tokens, call.result
    assert tokens is not None
    assert wanted is not None
    arguments = named(names_of(type(attention).forward), call.args, call.kwargs)
    with torch.no_grad():
        for positions in (*candidates(attention, call, counts), None):
            for heads in _candidates(attention, tokens.shape[-1]):
                heads = heads.model_copy(update={"positions": positions})
                try:
                    found = attend_as(attention, heads, tokens, arguments)
                except RuntimeError:  # shapes that do not go together
                    continue
                if alike(found, wanted):
                    return heads
    raise NotProvenError(
        f"the attention of {where} is not softmax(QKᵀ)V of linear projections of its tokens: what was worked out from "
        "its parts differs from its own output (positions of its own, relative ones, or another kind of attention)"
    )


def attend_as(attention: nn.Module, heads: Heads, tokens: torch.Tensor, arguments: dict) -> torch.Tensor:
    """What the attention gives for (B, N, C) and the other arguments of its call, by what was found."""
    queries, keys, values = project(attention, heads, tokens)
    if heads.positions is not None:
        angles = read(heads.positions, arguments[heads.positions.name])
        queries, keys = (turned(heads.positions, each, *angles) for each in (queries, keys))
    joined = F.scaled_dot_product_attention(queries, keys, values, scale=heads.scale).transpose(1, 2).flatten(2)
    return joined if heads.output is None else attention.get_submodule(heads.output)(joined)


def project(attention: nn.Module, heads: Heads, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(B, N, C) → queries, keys and values, (B, H, N, D)."""
    return form(attention, heads, [attention.get_submodule(name)(tokens) for name in heads.projections])


def form(attention: nn.Module, heads: Heads, projected: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """What the projections gave → queries, keys and values, (B, H, N, D); the values only if they were projected."""
    if heads.order != "apart":
        parts = projected[0].unflatten(-1, (3, heads.count, -1) if heads.order == "qkv heads" else (heads.count, 3, -1))
        projected = list(parts.unbind(-3 if heads.order == "qkv heads" else -2))
    else:
        projected = [each.unflatten(-1, (heads.count, -1)) for each in projected]
    projected[:2] = normalised(attention, heads, *projected[:2])
    return tuple(each.transpose(1, 2) for each in projected)


def normalised(attention: nn.Module, heads: Heads, *projected: torch.Tensor) -> list[torch.Tensor]:
    """Queries and keys (B, N, H, D), with the attention's norms of them, if it has any."""
    found = list(projected)
    for index, name in enumerate(heads.norms):
        norm, each = attention.get_submodule(name), found[index]
        found[index] = norm(each) if heads.norm_heads else norm(each.flatten(-2)).unflatten(-1, (heads.count, -1))
    return found


def _candidates(attention: nn.Module, width: int) -> Iterator[Heads]:
    """All that its parts could be, the likeliest first."""
    linears = {name: part for name, part in attention.named_modules() if isinstance(part, nn.Linear)}
    takes = [name for name, part in linears.items() if part.in_features == width]
    fused = [name for name in takes if linears[name].out_features % 3 == 0 and linears[name].out_features > width]
    plain = [name for name in takes if name not in fused]
    norms = _norms(attention, linears)
    for count, scale in itertools.product(_counts(attention, width), _scales(attention)):
        for chosen in fused:
            inner = linears[chosen].out_features // 3
            for output, order, (names, each) in itertools.product(
                _outputs(linears, inner, [chosen]), ("qkv heads", "heads qkv"), norms
            ):
                yield _heads(count, [chosen], order, scale, output, names, each, inner)
        for triple in itertools.permutations(plain, 3):
            inner = linears[triple[0]].out_features
            for output, (names, each) in itertools.product(_outputs(linears, inner, triple), norms):
                yield _heads(count, list(triple), "apart", scale, output, names, each, inner)


def _heads(count, projections, order, scale, output, norms, norm_heads, inner) -> Heads:
    return Heads(
        count=count,
        projections=projections,
        order=order,
        norms=norms,
        norm_heads=norm_heads,
        scale=scale or (inner / count) ** -0.5,
        output=output,
    )


def _outputs(linears: dict[str, nn.Linear], inner: int, used) -> list[str | None]:
    """What could be the projection after the heads; with all of them used, none."""
    left = [name for name, part in linears.items() if name not in used and part.in_features == inner]
    return list(left) or [None]


def _norms(attention: nn.Module, linears: dict) -> list[tuple[list[str], bool]]:
    """Pairs that could normalise queries and keys, head by head or together; first of all none."""
    found = [
        name
        for name, part in attention.named_modules()
        if name and name not in linears and "norm" in type(part).__name__.lower() and not list(part.children())
    ]
    pairs = [list(pair) for pair in itertools.permutations(found, 2)] if len(found) <= 3 else []
    return [([], False), *((pair, each) for pair in pairs for each in (True, False))]


def _counts(attention: nn.Module, width: int) -> list[int]:
    """Numbers of heads: what the module or its config says, then others."""
    holders = (attention, *attention.children(), getattr(attention, "config", None))
    said = [value for holder in holders for name in HEADS if isinstance(value := getattr(holder, name, None), int)]
    others = [count for count in (12, 16, 6, 8, 3, 4, 24, 20, 1, 2) if width % count == 0]
    return list(dict.fromkeys([*said, *(said or others)]))


def _scales(attention: nn.Module) -> list[float | None]:
    """Factors of QKᵀ: one over the root of a head's width, or what the module says."""
    said = [getattr(attention, name, None) for name in SCALES]
    return [None, *(float(value) for value in said if isinstance(value, (int, float)) and math.isfinite(value))]
