"""Segments: layers in a row that share one choice, with the bypasses that form groups.

The groups of the first layer run all of them, so that choosing tokens and moving them is paid once. All tokens leave
every layer nevertheless, each with the whole update of its group so far: hidden states are there and hooks work. Where
nobody looks at them inside a segment, compilers leave them out.
"""

import torch

from tosa_convert.methods.bypass import Bypass
from tosa_convert.methods.packing import as_row
from tosa_convert.methods.token_ops import Choice, gather_tokens, rejoin_tokens, stand_ins
from tosa_convert.selective.forward_state import Course, ForwardState, Left, Segment, version_of


def form(bypass: Bypass, tokens: torch.Tensor, normed: torch.Tensor, choice: Choice):
    """The groups of a choice when they enter its first layer; and what that layer's norm gives for them, None where
    that is left to it."""
    gathered = bypass.gather(tokens, normed, choice)
    segment = Segment(choice, None if choice.partners is None else stand_ins(choice), gathered.sizes)
    return segment, Course(tokens, gathered.tokens, gathered.tokens), gathered.normed


def take_up(bypass: Bypass, tokens: torch.Tensor, segment: Segment, left: Left | None) -> Course:
    """The groups that the layer before left, or those that the tokens form now.

    All tokens of a group have got the same update, so both are equal up to rounding. The second way is for tokens that
    a hook has changed, and for gradients: checkpointing runs a layer again on tokens that are cut off from what came
    before.
    """
    differentiable = torch.is_grad_enabled() and tokens.requires_grad
    unchanged = left is not None and left.tokens is tokens and left.version == version_of(tokens)
    if left is not None and left.course is not None and unchanged and not differentiable:
        return left.course
    entered = as_row(tokens, segment.choice)
    groups = bypass.gather(entered, None, segment.choice).tokens
    return Course(entered, groups, groups)


def leave(segment: Segment, course: Course) -> torch.Tensor:
    """(B, N, D), the tokens that leave a layer together with its groups."""
    if segment.places is None:
        return rejoin_tokens(course.entered, segment.choice.attended, course.groups)
    return course.entered + gather_tokens(course.groups - course.before, segment.places)


def hand_on(state: ForwardState, layer: int, segment: Segment, course: Course | None, tokens: torch.Tensor) -> None:
    """Leave groups to the next layer, and the tokens that leave this one with them; without a course where hooks look
    at these, which may change them unseen."""
    state.left[layer] = Left(segment, course, tokens, version_of(tokens))
