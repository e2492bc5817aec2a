"""What timm's training script has by these names: its optimisers, schedules, learning rates by layer and averages."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from timm.layers import DropPath
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn

from tosa_convert.base.errors import UsageError, gist
from tosa_convert.config.settings import TrainSettings
from tosa_convert.methods.parts import near
from tosa_convert.models.adapter import Adapter, adapter_of

STEPS_DOWN = 3
"""Parts of the schedule "step", each at a tenth of the rate of the one before."""


def check_optimiser(settings: TrainSettings) -> None:
    """
    Raises:
        UsageError: timm has none of this name, or it wants gradients of gradients.
    """
    name, known = settings.opt.removeprefix("lookahead_"), list_optimizers()
    if name not in known:
        hint = near(name, known) or "timm.optim.list_optimizers() says what there is"
        raise UsageError(f"timm has no optimiser {name!r}; {hint}")
    if get_optimizer_info(name).second_order:
        raise UsageError(f"optimiser {name!r} wants gradients of gradients, which training does not keep; take another")


def check_weights(module: nn.Module) -> None:
    """
    Raises:
        UsageError: weights in float16, which small steps would not change.
    """
    if any(parameter.dtype == torch.float16 for parameter in module.parameters()):
        raise UsageError(
            "the weights are float16, and training in it ends in nan; use model.float(), and precision bf16 for speed"
        )


def make_optimizer(trained: nn.Module, settings: TrainSettings, scales: dict[nn.Parameter, float] | None = None):
    """timm's optimiser of a name, for what is trainable; weight decay is for the weights of layers, as in timm: not for
    norms, biases, class tokens and position embeddings.

    Args:
        scales: parameter → what its learning rate is multiplied by, 1 if it is not there.

    Raises:
        UsageError: nothing is trainable, or there is no optimiser of this name, or it needs a package that is missing.
    """
    check_optimiser(settings)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    embeddings = {module.weight for module in trained.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and name.endswith("weight") and parameter not in embeddings
            groups.setdefault(((scales or {}).get(parameter, 1.0), decays), []).append(parameter)
    if not groups:
        raise UsageError("nothing is trainable: all parameters are frozen; call model.requires_grad_(True) first")
    given = [
        {"params": some, "lr_scale": scale, "weight_decay": settings.weight_decay if decays else 0.0}
        for (scale, decays), some in groups.items()
    ]
    try:
        return create_optimizer_v2(given, opt=settings.opt, lr=settings.lr)
    except (ImportError, AssertionError, RuntimeError) as error:
        raise UsageError(f"optimiser {settings.opt!r} cannot be had here: {gist(error)}") from None


def make_schedule(optimizer: torch.optim.Optimizer, settings: TrainSettings, steps: int) -> Callable[[int], None]:
    """Sets the learning rate of a step, from 0: a linear rise, then timm's schedule of this name, down to zero."""
    rising = max(1, round(steps * settings.warmup)) if settings.warmup else 0
    falling = max(1, steps - rising)
    schedule, _ = create_scheduler_v2(
        optimizer,
        settings.sched,
        num_epochs=falling,
        decay_epochs=-(-falling // STEPS_DOWN),
        decay_rate=1.0 if settings.sched == "poly" else 0.1,  # the power of "poly"
        warmup_epochs=rising,
        warmup_prefix=True,
        warmup_lr=settings.lr / (rising + 1),
    )
    return schedule.step


def layer_scales(model: nn.Module, decay: float) -> dict[nn.Parameter, float]:
    """Learning rates that fall by a factor from each layer to the one before it, down to the patch embedding; what
    comes after the layers, such as the head, has the full one (BEiT, arXiv 2106.08254). What stands between two of
    them, such as layers of windows, learns as the one before."""
    blocks = adapter_of(model).blocks
    of_blocks = {parameter: index for index, block in enumerate(blocks) for parameter in block.parameters()}
    scales, depth = {}, -1
    for parameter in model.parameters():  # in the order in which a model is made
        depth = max(depth, of_blocks.get(parameter, depth))
        behind = depth == len(blocks) - 1 and parameter not in of_blocks
        scales[parameter] = 1.0 if behind else decay ** (len(blocks) - of_blocks.get(parameter, depth))
    return scales


@contextmanager
def drop_path(adapter: Adapter, rate: float) -> Iterator[None]:
    """Within this block layers are dropped while training, the first never, the last at this rate (stochastic depth,
    arXiv 1603.09382).

    Raises:
        UsageError: the model has no place for it.
    """
    found = [
        (index, block, name, child)
        for index, block in enumerate(adapter.blocks if rate else [])
        for name, child in block.named_children()
        if name.startswith("drop_path")
    ]
    if rate and not found:
        raise UsageError(f"{type(adapter.model).__name__} has no stochastic depth, so leave drop_path out")
    for index, block, name, child in found:
        setattr(block, name, DropPath(rate * index / max(1, len(adapter.blocks) - 1)).train(child.training))
    try:
        yield
    finally:
        for _, block, name, child in found:
            setattr(block, name, child)
