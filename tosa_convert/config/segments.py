"""Which layers share a choice, by the option ``segment``."""

import itertools
from collections.abc import Mapping, Sequence


def in_segments(layers: list[int], segment: int | list[int]) -> list[list[int]]:
    """Layers, in order, by segments.

    Args:
        segment: how many layers in a row share one choice: a number, or that of each segment.

    Raises:
        ValueError: segments that these layers do not fill, or none in which there are two.
    """
    layers = sorted(layers)
    if isinstance(segment, list):
        return _of_lengths(layers, segment)
    found: list[list[int]] = []
    for layer in layers:
        if found and found[-1][-1] == layer - 1 and len(found[-1]) < segment:
            found[-1].append(layer)
        else:
            found.append([layer])
    if segment > 1 and len(found) == len(layers):
        raise ValueError("no two selective layers follow one another, so no choice can be shared; leave segment out")
    return found


def check_same(what: str, segments: Sequence[Sequence[int]], given: Mapping[int, float | None]) -> None:
    """Layers that share one choice go by the same.

    Args:
        what: the layers are given: a ratio, or a threshold.
        given: layer → that.

    Raises:
        ValueError: they are given different ones.
    """
    for segment in segments:
        if len({given[layer] for layer in segment}) > 1:
            raise ValueError(
                f"layers {segment[0]} to {segment[-1]} share one choice, so one {what}, not "
                f"{', '.join(f'{given[layer]:g}' for layer in segment)}; give them the same, or leave segment out"
            )


def as_option(segments: Sequence[Sequence[int]]) -> int | list[int]:
    """The option ``segment`` that makes these of their layers."""
    lengths = list(map(len, segments))
    return lengths if max(lengths, default=1) > 1 else 1


def _of_lengths(layers: list[int], lengths: list[int]) -> list[list[int]]:
    if sum(lengths) != len(layers):
        raise ValueError(
            f"segments of {', '.join(map(str, lengths))} layers make {sum(lengths)}, and {len(layers)} layers are "
            "selective; let the numbers add up to that, or leave segment out"
        )
    ends = list(itertools.accumulate(lengths))
    found = [layers[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    for segment in found:
        if segment[-1] - segment[0] >= len(segment):
            raise ValueError(
                f"layers {', '.join(map(str, segment))} do not follow one another, so they cannot share a choice"
            )
    return found
