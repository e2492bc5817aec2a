"""Take a block apart by what its modules do, and prove what a selective layer relies on."""

import math
from typing import NamedTuple

import torch
from torch import nn

from tosa_convert.models.proof.attention import attend_as, work_out
from tosa_convert.models.proof.calls import Call, NotProvenError, alike, first_of, how_many, packed, record, repeat
from tosa_convert.models.proof.positions import candidates, len_of, named, names_of, permuted
from tosa_convert.models.proof.row import Row
from tosa_convert.models.proof.structure import Heads


class Parts(NamedTuple):
    """Names of a block's parts, see :class:`~tosa_convert.models.proof.structure.Structure`."""

    norm: str | None
    attention: str
    mlp: str | None
    returns: int
    attention_returns: int
    heads: Heads


def take_row_apart(row: Row) -> Parts:
    """The parts of the blocks of a row, which are those of the first, and do the same in all of them.

    Raises:
        NotProvenError: a proof fails; the message says which, and of which block.
    """
    patches = math.prod(row.grid)
    places = [f"{row.name}.{index} ({type(block).__name__})" for index, block in enumerate(row.blocks)]
    parts = take_apart(row.blocks[0], row.calls[0], places[0], patches)
    for index, (block, call, where) in enumerate(zip(row.blocks, row.calls, places, strict=True)):
        if index and not _does_the_same(block, call, parts, (call.tokens.shape[1], patches)):
            for each in range(index, min(index + 2, len(places))):  # says what is wrong; the next may change its tokens
                take_apart(row.blocks[each], row.calls[each], places[each], patches)
            raise NotProvenError(f"{where} is made otherwise than {places[0]}, and a row of blocks is converted as one")
    return parts


def _does_the_same(block: nn.Module, call: Call, parts: Parts, counts: tuple[int, ...]) -> bool:
    """Whether the parts of a block do what those of another one were proven to do; it runs once."""
    names = [name for name in (parts.norm, parts.attention, parts.mlp) if name is not None]
    if any(name not in dict(block.named_modules()) for name in names) or _gives_more(call):
        return False
    permutes: list[bool] = []
    modules = {name: block.get_submodule(name) for name in names}
    calls = record(modules, lambda: permutes.append(_permutes(block, call, call.result, counts)))
    if not permutes[0] or len(calls) < len(names):
        return False
    attention, taken = modules[parts.attention], calls[parts.attention]
    arguments = named(names_of(type(attention).forward), taken.args, taken.kwargs)
    returns = (how_many(call.output), how_many(taken.output))
    try:
        attended = alike(attend_as(attention, parts.heads, taken.tokens, arguments), taken.result)
    except (RuntimeError, AttributeError, KeyError):  # it has other projections
        return False
    normed = parts.norm is None or torch.equal(calls[parts.norm].result, taken.tokens)
    silent = parts.mlp is None or _leaves_tokens(block, call, parts)
    return attended and normed and silent and returns == (parts.returns, parts.attention_returns)


def _gives_more(call: Call) -> bool:
    return isinstance(call.output, (tuple, list)) and any(value is not None for value in call.output[1:])


def _leaves_tokens(block: nn.Module, call: Call, parts: Parts) -> bool:
    """Whether tokens leave a block as they came if its attention and its MLP add nothing."""
    zeros = torch.zeros_like(call.tokens)
    returns = {parts.attention: parts.attention_returns, parts.mlp: 0}
    try:
        for name, count in returns.items():
            block.get_submodule(name).forward = lambda *args, count=count, **kwargs: packed(count, zeros)
        return torch.equal(repeat(block, call, call.tokens), call.tokens)
    finally:
        for name in returns:
            del block.get_submodule(name).forward


def take_apart(block: nn.Module, call: Call, where: str, patches: int | None = None) -> Parts:
    """A block's norm, attention and MLP.

    Args:
        call: of the block.
        patches: how many of its tokens are; None if all are.
        where: its class and place, for messages.

    Raises:
        NotProvenError: a proof fails; the message says which.
    """
    counts = (call.tokens.shape[1], patches or call.tokens.shape[1])
    check_behaviour(block, call, counts, where)
    calls = record(dict(block.named_modules()), lambda: block(*call.args, **call.kwargs))
    calls.pop("", None)
    name = _attention(block, calls, where)
    attention = block.get_submodule(name)
    heads = work_out(attention, calls[name], counts, f"{where}, {name} ({type(attention).__name__})")
    norm = _norm(call.tokens, calls, name, where)
    mlp = _mlp(block, call, calls, name)
    _check_nothing_else_mixes(block, call, name, how_many(calls[name].output), where)
    return Parts(norm, name, mlp, how_many(call.output), how_many(calls[name].output), heads)


def check_behaviour(block: nn.Module, call: Call, counts: tuple[int, ...], where: str) -> None:
    """That a block gives one tensor, the same for the same tokens, changes nothing in place, and knows no positions but
    those that it is called with.

    Raises:
        NotProvenError: which of these does not hold.
    """
    if _gives_more(call):
        raise NotProvenError(f"{where} returns {len(call.output)} values, not only its tokens")
    tokens = call.tokens
    given = tokens.clone()
    found = repeat(block, call, given)
    if not torch.equal(given, tokens):
        raise NotProvenError(f"{where} changes the tokens that it is given in place")
    if not torch.equal(found, repeat(block, call, tokens)):
        raise NotProvenError(f"{where} gives something else each time: it draws random numbers in eval mode")
    if not _permutes(block, call, found, counts):
        raise NotProvenError(
            f"{where} knows positions: permuted tokens do not come out permuted (positions of its own, relative ones, "
            "a causal mask, windows, or a convolution inside)"
        )


def _permutes(block: nn.Module, call: Call, found: torch.Tensor, counts: tuple[int, ...]) -> bool:
    """Whether permuted patches come out permuted, if the positions that the block is called with go along."""
    count, patches = counts
    generator = torch.Generator().manual_seed(0)
    tokens, given = call.tokens, named(names_of(type(block).forward), call.args, call.kwargs)
    mine = [positions for positions in candidates(block, call, counts) if positions.turn == "halves"]
    if not mine:
        order = torch.randperm(count, generator=generator).to(tokens.device)
        return alike(repeat(block, call, tokens[:, order]), found[:, order])
    for positions in mine:
        known = len_of(positions, given[positions.name])
        those = torch.randperm(known, generator=generator).to(tokens.device)
        order = torch.cat([torch.arange(count - known, device=tokens.device), those + count - known])
        value = given[positions.name]
        again = repeat(block, call, tokens[:, order], (value, permuted(positions, value, those)))
        if alike(again, found[:, order]):
            return True
    return False


def _attention(block: nn.Module, calls: dict[str, Call], where: str) -> str:
    """The smallest module of the block whose output for one token depends on the others, and that has projections."""
    count = max(call.tokens.shape[1] for call in calls.values() if call.tokens is not None)
    mixing = [
        name
        for name, call in calls.items()
        if call.tokens is not None
        and call.result is not None
        and call.result.shape == call.tokens.shape
        and call.tokens.shape[1] == count
        and any(isinstance(part, nn.Linear) for part in block.get_submodule(name).modules())
        and _mixes(block.get_submodule(name), call)
    ]
    inmost = [name for name in mixing if not any(other.startswith(f"{name}.") for other in mixing)]
    if not inmost:
        raise NotProvenError(f"{where} has no attention as a module of its own")
    if len(inmost) > 1:
        raise NotProvenError(f"{where} has several modules that mix tokens: {', '.join(inmost)}")
    return inmost[0]


def _mixes(module: nn.Module, call: Call) -> bool:
    half = call.tokens.shape[1] // 2  # one token of thousands may be too little to be seen
    noise = torch.randn(call.tokens[:, half:].shape, generator=torch.Generator().manual_seed(0)).to(call.tokens)
    changed = torch.cat([call.tokens[:, :half], call.tokens[:, half:] + noise * call.tokens.std()], dim=1)
    difference = (repeat(module, call, changed) - call.result)[:, :half].abs().max()
    return bool(difference > 1e-6 * call.result.abs().max())


def _check_nothing_else_mixes(block: nn.Module, call: Call, attention: str, returns: int, where: str) -> None:
    """That tokens see each other in the attention only.

    Raises:
        NotProvenError: they do elsewhere.
    """
    part, zeros = block.get_submodule(attention), torch.zeros_like(call.tokens)
    part.forward = lambda *args, **kwargs: packed(returns, zeros)
    try:
        mixes = _mixes(block, call._replace(output=repeat(block, call, call.tokens)))
    finally:
        del part.forward
    if mixes:
        raise NotProvenError(f"{where} lets tokens see each other outside of its attention, {attention}")


def _norm(tokens: torch.Tensor, calls: dict[str, Call], attention: str, where: str) -> str | None:
    """What the tokens go through before the attention."""
    taken = calls[attention].tokens
    if taken is tokens or torch.equal(taken, tokens):
        return None
    for name, call in calls.items():
        if call.tokens is not None and call.result is taken and torch.equal(call.tokens, tokens):
            return name
    raise NotProvenError(f"what {where} does with its tokens before its attention is not a single module")


@torch.no_grad()
def _mlp(block: nn.Module, call: Call, calls: dict[str, Call], attention: str) -> str | None:
    """The module that runs on the tokens after the attention and whose output is added to them, if there is one: with
    both silent, the tokens have to leave the block as they came."""

    def silent(module, args, output):
        zeros = torch.zeros_like(first_of(output))
        return (zeros, *output[1:]) if isinstance(output, tuple) else zeros

    names = [name for name, part in block.named_children() if name in calls and name != attention]
    for name in reversed(names):
        linears = [part for part in block.get_submodule(name).modules() if isinstance(part, nn.Linear)]
        if len(linears) < 2 or attention.startswith(f"{name}."):
            continue
        parts = [block.get_submodule(each) for each in (attention, name)]
        handles = [part.register_forward_hook(silent) for part in parts]
        try:
            left = repeat(block, call, call.tokens)
        finally:
            for handle in handles:
                handle.remove()
        if torch.equal(left, call.tokens):
            return name
    return None
