"""The published methods as rows of one table, and the schedules: which layers, and how many tokens.

ToSA (arXiv 2406.08816), ToMe (2210.09461), IdleViT (2310.05654) and EViT (2202.07800) are named; what each
needs besides, such as ToSA's distillation, is told by its score. A new method is a new row.
"""

METHODS = {
    "tosa": {"score": "attention", "bypass": "identity", "schedule": "pairs"},
    "tome": {"score": "similarity", "bypass": "persist", "schedule": "ramp"},
    "idle": {"score": "class_attention", "bypass": "identity", "schedule": "stages"},
    "evit": {"score": "class_attention", "bypass": "fuse", "schedule": "stages"},
    "random": {"score": "random", "bypass": "identity", "schedule": "pairs"},
}


def schedule_layers(schedule: str, depth: int, first: int) -> list[int]:
    """The selective layers (from 1) that a schedule stands for in a model with ``depth`` layers.

    "pairs": every second one from 2 to depth − 2 (ToSA's setting); "stages": the last three quarters
    (IdleViT's and EViT's setting); otherwise all from the ``first`` that can be.
    """
    if schedule == "pairs":
        return list(range(2, depth - 1, 2))
    if schedule == "stages":
        return list(range(depth // 4 + 1, depth + 1))
    return list(range(first, depth + 1))


def schedule_ratios(schedule: str, ratio: float, count: int, lasting: bool) -> list[float]:
    """The keep ratio of each of ``count`` selective layers, in order.

    "pairs" and "all": the same for each. "ramp": falls evenly, and ``ratio`` is the mean; under a
    lasting bypass this is a fixed number of tokens per layer, ToMe's r. "stages": ρ, ρ², ρ³ in thirds.

    Raises:
        ValueError: a ramp that would reach zero.
    """
    if schedule == "ramp":
        lowest = 2 * ratio - 1
        if lowest <= 0:
            raise ValueError(f"a ramp with a mean ratio of {ratio} would end at no token at all; stay above 0.5")
        places = [(index + (1 if lasting else 0.5)) / count for index in range(count)]
        return [round(1 - 2 * (1 - ratio) * place, 6) for place in places]
    if schedule == "stages":
        return [round(ratio ** (1 + 3 * index // count), 6) for index in range(count)]
    return [ratio] * count
