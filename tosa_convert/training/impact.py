"""Stage 1 of token impact (DL-ViT, arXiv 2305.14840, section 3): what the loss does without each token, and a filter
that learns which ones it would miss. The model itself does not move."""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from tosa_convert.base import distributed as processes
from tosa_convert.base.errors import InterruptedTrainingError, TosaError, TosaWarning, UsageError, gist
from tosa_convert.base.files import atomic
from tosa_convert.base.progress import Progress
from tosa_convert.base.seeding import seed_everything, unmoved
from tosa_convert.config.settings import DistillSettings
from tosa_convert.data.images import Images, spread
from tosa_convert.methods.scores.impact import KEPT, Impact
from tosa_convert.models.adapter import Adapter, adapter_of, run
from tosa_convert.models.outputs import EMBEDDING, outputs_of
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.runs.metrics_log import append_metrics
from tosa_convert.selective.selection import all_tokens, choosing_blocks
from tosa_convert.tasks.task import Task, task_of
from tosa_convert.training.engine import lent
from tosa_convert.training.optimisation import check_weights, make_optimizer, make_schedule

FILE = "impact.safetensors"
AT_ONCE = 64
"""Copies of an image, each without another token, in one forward pass."""
HELD_OUT = 5
"""One in so many images tells how well the filter learnt."""
TOO_FEW = "one image is too few: the filter is judged on images that it did not learn from; give more"


class Example(NamedTuple):
    """What an image gives to learn from: its tokens as they enter the filtered layer, (N, D), without those that are no
    patches, and the impact of each, (N,), in nats."""

    tokens: torch.Tensor
    impact: torch.Tensor


def learn_impact(
    model: nn.Module,
    data: str | Path | None,
    settings: DistillSettings,
    out: Path | None,
    resume: bool,
    seed: int,
    device: str | None,
    progress: Progress,
) -> dict:
    """Label tokens of a sample of the images by their impact, and train the filter on these labels. Several processes
    each do all of it; the first one writes.

    Returns:
        {"loss", "precision", "recall", "kept", "steps", "rho", "images", "broken"}; precision, recall and kept on
        images that the filter did not learn from: how many of the tokens that pass are labelled, how many of the
        labelled ones pass, and which share of all passes. "rho" is from which impact on a token is labelled.
    """
    check_weights(model)
    task = task_of(model)
    images = task.read(data, preprocessing_of(model), None, seed)
    if images.reader.streams:
        raise UsageError("token impact looks at a sample of the images, and a stream has none; give hfds: or a folder")
    if min(settings.examples, len(images)) < 2:
        raise UsageError(TOO_FEW)
    if out:
        out.mkdir(parents=True, exist_ok=True)
    with lent(model):
        model.to(processes.pick_device(device)).eval()
        worked_out = _Examples(out / FILE if out else None, resume, settings.checkpoint_minutes)
        broken = _worked_out(model, task, images, settings.examples, worked_out, progress)
        if not worked_out.found:
            raise TosaError(f"none of the images in {images.name} can be read")
        examples = [worked_out.found[index] for index in sorted(worked_out.found)]
        figures = _train(model, examples, settings, seed, progress)
    if out and processes.is_main():
        append_metrics(
            out, stage="distill", step=figures["steps"], **{k: v for k, v in figures.items() if k != "steps"}
        )
    return {**figures, "images": len(examples), "broken": broken}


def impact_of(model: nn.Module, image: torch.Tensor, label: int | None) -> Example:
    """The impact of each patch token of one image (1, C, H, W) on the model with all of its tokens.

    Args:
        label: its class; without one the divergence from the model's own output stands in for the loss.
    """
    adapter, block = adapter_of(model), choosing_blocks(model)[0]
    with torch.no_grad(), all_tokens(model), _Zeroing(adapter, block) as zeroing:
        kind, whole = _main(run(model, image))
        tokens = zeroing.seen[0, adapter.prefix :]
        before, losses = _loss(kind, whole, whole, label), []
        for places in torch.arange(len(tokens), device=image.device).split(AT_ONCE):
            zeroing.places = places + adapter.prefix
            _, found = _main(run(model, image.expand(len(places), -1, -1, -1)))
            losses.append(_loss(kind, found, whole.expand(len(places), *whole.shape[1:]), label))
    return Example(tokens.float().cpu(), (torch.cat(losses) - before).float().cpu())


def _main(outputs: dict[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
    kind, output = next(iter(outputs.items()))
    return kind, output.float()


def _loss(kind: str, found: torch.Tensor, whole: torch.Tensor, label: int | None) -> torch.Tensor:
    """Per image: cross-entropy, KL to the whole model's logits, of embeddings one less the cosine, or of other outputs
    their distance, (B,)."""
    if label is not None:
        return F.cross_entropy(found, torch.full((len(found),), label, device=found.device), reduction="none")
    if kind == EMBEDDING:
        return 1 - F.cosine_similarity(found, whole)
    if found.ndim == 2:
        return F.kl_div(found.log_softmax(-1), whole.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    return (found - whole).square().flatten(1).mean(1) / whole.square().mean().clamp(min=1e-12)


class _Zeroing:
    """Before a block, sets one token of each image of a batch to zero; keeps the tokens of the last whole one."""

    def __init__(self, adapter: Adapter, block: nn.Module):
        self.adapter, self.block = adapter, block
        self.places: torch.Tensor | None = None
        self.seen = torch.empty(0)

    def __enter__(self) -> "_Zeroing":
        self.handle = self.block.register_forward_pre_hook(self._zero, with_kwargs=True)
        return self

    def __exit__(self, *error) -> None:
        self.handle.remove()

    def _zero(self, block: nn.Module, args: tuple, kwargs: dict):
        entering, _, _ = self.adapter.entering(args, kwargs)
        tokens = self.adapter.taken(entering)
        if self.places is None:
            self.seen = tokens
            return args, kwargs
        left = tokens.clone()
        left[torch.arange(len(left), device=left.device), self.places] = 0.0
        fresh = self.adapter.restored(left, entering)
        if args:
            return (fresh, *args[1:]), kwargs
        return args, {name: fresh if value is entering else value for name, value in kwargs.items()}


class _Examples:
    """What is worked out so far, by the index of its image, and the file that keeps it.

    Args:
        minutes: after so many it is written again, with all that it holds.
    """

    def __init__(self, file: Path | None, resume: bool, minutes: float):
        self.file, self.minutes, self.written = file, minutes, time.monotonic()
        self.found: dict[int, Example] = {}
        if resume and file is not None and file.exists():
            try:
                stored = load_file(file)
            except Exception as error:
                raise TosaError(f"{file} is damaged ({gist(error)}); remove it to work it out anew") from None
            indices = [int(name.removeprefix("impact.")) for name in stored if name.startswith("impact.")]
            self.found = {index: Example(stored[f"tokens.{index}"], stored[f"impact.{index}"]) for index in indices}

    def add(self, index: int, example: Example) -> None:
        self.found[index] = example
        if time.monotonic() - self.written > 60 * self.minutes:
            self.write()
            self.written = time.monotonic()

    def write(self) -> None:
        if self.file is None or not self.found or not processes.is_main():
            return
        with atomic(self.file) as fresh:
            tokens = {f"tokens.{index}": each.tokens.contiguous() for index, each in self.found.items()}
            save_file({**tokens, **{f"impact.{index}": each.impact for index, each in self.found.items()}}, fresh)

    @contextmanager
    def kept(self, count: int) -> Iterator[None]:
        """Writes them however the work ends.

        Raises:
            InterruptedTrainingError: of Ctrl-C, with how to go on.
        """
        try:
            yield
        except KeyboardInterrupt:
            if self.file is None or not self.found:
                raise
            raise InterruptedTrainingError(
                f"interrupted after {len(self.found)} of {count} images; go on with the same command and --out "
                f"{self.file.parent} --resume"
            ) from None
        finally:
            self.write()


def _worked_out(
    model: nn.Module, task: Task, images: Images, count: int, examples: _Examples, progress: Progress
) -> list[str]:
    """Adds what is missing of ``count`` images spread over all; gives the names of the broken ones."""
    labelled = _has_labels(task, images, model)
    device, count = next(model.parameters()).device, min(count, len(images))
    missing = set(spread(len(images), count)) - examples.found.keys()
    broken: list[str] = []
    bar = progress.track("token impact", count, done=count - len(missing), unit="images")
    with examples.kept(count), bar as advance:
        for index in sorted(missing):
            image, label, name = images[index]
            if image is None:
                broken.append(name)
            else:
                examples.add(index, impact_of(model, image[None].to(device), int(label) if labelled else None))
            advance()
    return broken


def _has_labels(task: Task, images: Images, model: nn.Module) -> bool:
    """Labels of other classes than the model's say nothing of its loss; maps are not learnt from."""
    if not outputs_of(model):
        return False
    try:
        return task.has_labels(images, model)
    except UsageError as error:
        message = f"labels are left out ({str(error).partition(';')[0]}): the KL to the model's own output is the loss"
        warnings.warn(message, TosaWarning, stacklevel=2)
        return False


@unmoved()
def _train(model: nn.Module, examples: list[Example], settings: DistillSettings, seed: int, progress: Progress) -> dict:
    """Train the filter; {"loss", "precision", "recall", "kept", "steps"}."""
    score: Impact = choosing_blocks(model)[0].selector.requires_grad_(True)
    device = next(model.parameters()).device
    tokens, impact = (torch.stack(each).to(device) for each in zip(*examples, strict=True))
    tokens = tokens.to(next(score.parameters()).dtype)
    if len(tokens) < 2:
        raise UsageError(TOO_FEW)
    rho = score.options.rho
    if rho is None:
        rho = impact.flatten().quantile(1 - (score.options.kept or KEPT)).item()
    labels = impact > rho
    if labels.all() or not labels.any():
        raise UsageError(
            f"rho {rho:g} labels {'all' if labels.any() else 'none'} of the tokens, whose impacts are "
            f"{impact.min():.3g} to {impact.max():.3g}; give one in between, or --kept in its place; what "
            "was worked out is kept for --resume"
        )
    held_out = torch.arange(len(tokens), device=device) % HELD_OUT == HELD_OUT - 1
    held_out[-1] = True
    own = (~held_out).nonzero()[:, 0]
    optimizer, steps = make_optimizer(score, settings, None), settings.total_steps(len(own), 1)
    schedule = make_schedule(optimizer, settings, steps)
    seed_everything(seed)
    at_once = settings.batch_size * settings.accumulate  # it is small enough
    with torch.enable_grad(), progress.track("filter", steps) as advance:
        for step in range(steps):
            schedule(step)
            drawn = own[torch.randint(len(own), (min(at_once, len(own)),), device=device)]
            loss = score.fit(tokens[drawn], labels[drawn])
            loss.backward()
            nn.utils.clip_grad_norm_(score.parameters(), settings.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            advance(f"loss {loss.item():.4f}" if step % 10 == 0 else "")
    with torch.no_grad():
        passed, wanted = score.logits(tokens[held_out]) >= 0, labels[held_out]
    both = (passed & wanted).sum().item()
    return {
        "loss": loss.item(),
        "precision": both / max(1, passed.sum().item()),
        "recall": both / max(1, wanted.sum().item()),
        "kept": passed.float().mean().item(),
        "rho": float(rho),
        "steps": steps,
    }
