"""One training engine for every stage, on accelerate: any device, mixed precision, several processes.

What a step does depends on the seed and the step number alone: the images it draws, how they
are augmented, the dropout. So a training that was interrupted goes on to the same result.
"""

import math
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, gather_object
from safetensors.torch import load_model, save_model
from timm.utils import ModelEmaV3
from torch import nn

from tosa_convert.base import distributed as processes
from tosa_convert.base.errors import InterruptedTrainingError, TosaError, UsageError, gist
from tosa_convert.base.files import read_json, write_json
from tosa_convert.base.progress import Progress
from tosa_convert.base.seeding import seed_everything, unmoved
from tosa_convert.config.settings import TrainSettings
from tosa_convert.data.images import Images, training_loader
from tosa_convert.runs.metrics_log import append_metrics, cut_metrics
from tosa_convert.training.float32_attention import attention_precision
from tosa_convert.training.optimisation import check_weights, make_optimizer, make_schedule

CHECKPOINT, STEP_FILE, AVERAGE_FILE = "checkpoint", "step.json", "average.safetensors"


@dataclass
class Stage:
    """One stage of training.

    Attributes:
        name: "distill" or "finetune"; it labels metrics and checkpoints.
        objective: module; ``forward(images, labels)`` gives {"loss": scalar, other figures}. Its
            trainable parameters are what the stage trains.
        settings: of the optimiser and the loop.
        seed: of everything random.
        out: run directory for metrics and checkpoints; None keeps nothing.
        resume: go on from the checkpoint in ``out``, if there is one.
        scales: parameter → what its learning rate is multiplied by.
        repeats: how often in a row each image is drawn.
        averaged: the part of the objective that ends as the moving average of its weights; None for none.
        decay: of that average; it rises to it.
    """

    name: str
    objective: nn.Module
    settings: TrainSettings
    seed: int = 0
    out: Path | None = None
    resume: bool = False
    scales: dict[nn.Parameter, float] = field(default_factory=dict)
    repeats: int = 1
    averaged: nn.Module | None = None
    decay: float = 0.0


def make_accelerator(device: str | None, settings: TrainSettings) -> Accelerator:
    """Where and how training runs; under torchrun, one per process."""
    on_cpu = processes.pick_device(device) == "cpu"
    if on_cpu and settings.precision == "fp16":
        raise UsageError("precision fp16 needs a GPU; use bf16 or no on the CPU")
    # accelerate keeps the device, precision and accumulation of the first stage for the whole program otherwise.
    AcceleratorState._reset_state(reset_partial_state=not processes.several())
    GradientState._reset_state()
    return Accelerator(
        cpu=on_cpu,
        mixed_precision=settings.precision,
        # The loader is read ahead, so its end must not count as the end of a group of batches.
        gradient_accumulation_plugin=GradientAccumulationPlugin(settings.accumulate, sync_with_dataloader=False),
        dataloader_config=DataLoaderConfiguration(dispatch_batches=False),  # a batch holds names too
        # A fine-tuned backbone may hold parameters that its forward never reaches, such as a mask token.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


@contextmanager
def lent(model: nn.Module) -> Iterator[None]:
    """Within this block a stage may freeze parameters of a model and move it. Afterwards the same parameters learn as
    before, and it is on its device, in eval mode."""
    home, learning = next(model.parameters()).device, {each: each.requires_grad for each in model.parameters()}
    try:
        yield
    finally:
        for parameter, learns in learning.items():
            parameter.requires_grad_(learns)
        model.to(home).eval()


@unmoved()
def train(stage: Stage, images: Images, accelerator: Accelerator, progress: Progress) -> dict:
    """Run a stage to its end.

    Returns:
        The figures of its last step, averaged over processes, with the number of steps and images
        seen, and the names of images that could not be read.

    Raises:
        UsageError: weights in float16, which small steps would not change.
    """
    check_weights(stage.objective)
    settings, world = stage.settings, accelerator.num_processes
    if stage.out:
        stage.out.mkdir(parents=True, exist_ok=True)
    steps = settings.total_steps(len(images) if settings.epochs else 0, world)
    optimizer = make_optimizer(stage.objective, settings, stage.scales)
    average = None
    if stage.averaged is not None:
        average = ModelEmaV3(stage.averaged, stage.decay, use_warmup=True, device=accelerator.device)
    per_step = settings.batch_size * settings.accumulate * world
    objective, optimizer = accelerator.prepare(stage.objective, optimizer)
    objective.train()
    schedule = make_schedule(optimizer, settings, steps)
    begun = _resume(stage, accelerator, average) if stage.resume else {}
    first = min(begun.get("step", 0), steps)
    drawn = (first * per_step, steps * per_step)
    loader = training_loader(images, settings.batch_size, *drawn, settings.workers, stage.repeats)
    loader = accelerator.prepare(loader)
    recorder = _Recorder(stage, accelerator, average)
    recorder.broken.update(begun.get("broken", []))
    stop = _CtrlC(enabled=stage.out is not None and world == 1)
    track = progress.track(stage.name, total=steps, done=first, unit="images", per_step=per_step)
    with stop, attention_precision(accelerator.device.type, accelerator.mixed_precision), track as advance:
        read = recorder.keeping(loader, world == 1)
        for step, passes in enumerate(_grouped(read, settings.accumulate), start=first + 1):
            seed_everything(stage.seed * 1_000_003 + step * world + accelerator.process_index)
            schedule(step - 1)
            figures = []
            for batch in passes:
                with accelerator.accumulate(objective):
                    found = objective(batch["images"], batch["labels"])
                    accelerator.backward(found["loss"])
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(objective.parameters(), settings.clip_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                figures.append({key: value.detach() for key, value in found.items()})
                recorder.broken.update(batch["broken"])
            if average is not None:
                average.update(stage.averaged, step)
            group = optimizer.param_groups[0]
            lr = group["lr"] / group.get("lr_scale", 1.0)  # as it was asked for, whatever a group makes of it
            recorder.note(step, figures, lr, images=step * per_step, final=step == steps)
            recorder.step = step
            recorder.checkpoint_when_due(step, final=step == steps)
            if stop.requested and step < steps:
                recorder.checkpoint(step)
                raise InterruptedTrainingError(
                    f"interrupted at step {step} of {steps}; go on with the same command and --out {stage.out} --resume"
                )
            advance(f"loss {recorder.last['loss']:.4f}" if recorder.last else "")
    if average is not None:
        stage.averaged.load_state_dict(average.module.state_dict())
    accelerator.wait_for_everyone()
    broken = sorted(set(gather_object(sorted(recorder.broken))))
    return {**recorder.last, "steps": steps, "images": steps * per_step, "broken": broken}


def _grouped(loader, size: int) -> Iterator[list[dict]]:
    """Batches in groups of one optimiser step."""
    group = []
    for batch in loader:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []


def _draws(stage: Stage) -> dict[str, int]:
    """What decides, with the number of processes, which images a step sees."""
    return {"seed": stage.seed, "batch_size": stage.settings.batch_size, "accumulate": stage.settings.accumulate}


def _resume(stage: Stage, accelerator: Accelerator, average: ModelEmaV3 | None) -> dict:
    """Load the stage's newest whole checkpoint, and its average; what was noted with it, nothing if there is none.

    Raises:
        UsageError: it is of another number of processes, other batches or another seed, and would see other images.
    """
    whole = {}
    for folder in (stage.out / CHECKPOINT, stage.out / f"{CHECKPOINT}.part"):
        if (folder / STEP_FILE).exists():  # written last
            noted = read_json(folder / STEP_FILE)
            if noted.get("stage") == stage.name:
                whole[noted["step"]] = folder, noted
    step, (folder, noted) = max(whole.items(), default=(0, (None, {})))
    world = accelerator.num_processes
    if noted.get("processes", world) != world:
        raise UsageError(
            f"this training was begun with {noted['processes']} processes and would go on elsewhere in its data with "
            f"{world}; resume it with as many (torchrun --nproc-per-node {noted['processes']})"
        )
    changed = [name for name, value in _draws(stage).items() if noted.get(name, value) != value]
    if changed:
        raise UsageError(
            f"this training was begun with another {' and '.join(changed)} and would go on elsewhere in its data; give "
            f"{', '.join(f'{name} {noted[name]}' for name in changed)} as before, or start anew with another --out"
        )
    if accelerator.is_main_process:
        cut_metrics(stage.out, stage.name, step)
    if folder is None:
        return {}
    try:
        accelerator.load_state(str(folder))
        if average is not None:
            load_model(average.module, folder / AVERAGE_FILE)
    except Exception as error:
        raise TosaError(f"cannot resume from {folder}: {gist(error)}; start anew with another --out") from error
    return noted


class _CtrlC:
    """Notes the first Ctrl-C or SIGTERM, so that the step in hand is finished and kept; a second one stops at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, enabled: bool):
        self.requested = False
        self.enabled = enabled and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> None:
        if self.enabled:
            self.before = {number: signal.signal(number, self._note) for number in self.SIGNALS}

    def __exit__(self, *error) -> None:
        if self.enabled:
            self._as_before()

    def _note(self, number: int, frame) -> None:
        self.requested = True
        self._as_before()

    def _as_before(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _settle(fresh: Path, kept: Path) -> None:
    """A whole fresh checkpoint takes the place of the kept one; half a one goes."""
    if (fresh / STEP_FILE).exists():
        shutil.rmtree(kept, ignore_errors=True)
        fresh.rename(kept)
    else:
        shutil.rmtree(fresh, ignore_errors=True)


class _Recorder:
    """Writes metrics and checkpoints as training goes."""

    def __init__(self, stage: Stage, accelerator: Accelerator, average: ModelEmaV3 | None):
        self.stage, self.accelerator, self.average = stage, accelerator, average
        self.broken: set[str] = set()
        self.step = 0
        self.last: dict[str, float] = {}
        self.started = self.saved = time.monotonic()

    def note(self, step: int, figures: list[dict[str, torch.Tensor]], lr: float, images: int, final: bool) -> None:
        """A line of metrics every so many steps: means over the batches of the step, on all processes."""
        if step % self.stage.settings.log_every and not final:
            return
        own = {key: torch.stack([each[key].float() for each in figures]).mean() for key in figures[0]}
        self.last = {key: value.item() for key, value in self.accelerator.reduce(own, "mean").items()}
        if not math.isfinite(self.last["loss"]):
            raise TosaError(f"the loss became {self.last['loss']} at step {step}; try a smaller --lr")
        if self.stage.out and self.accelerator.is_main_process:
            seconds = time.monotonic() - self.started
            line = {key: round(value, 6) for key, value in self.last.items()}
            append_metrics(
                self.stage.out,
                **{
                    "stage": self.stage.name,
                    "step": step,
                    **line,
                    "lr": lr,
                    "images": images,
                    "seconds": round(seconds, 1),
                },
            )

    def keeping(self, batches: Iterable[dict], alone: bool) -> Iterator[dict]:
        """The batches; if they cannot be read on, what was learnt is kept, so that training can be resumed."""
        try:
            yield from batches
        except Exception:
            if alone and self.stage.out and self.step:
                with suppress(TosaError):  # of weights that there is nothing to go on from
                    self.checkpoint(self.step)
            raise

    def checkpoint_when_due(self, step: int, final: bool) -> None:
        """Every few minutes, all processes together; the old checkpoint goes only when the new one is whole."""
        if self.stage.out is None or final:
            return
        due = time.monotonic() - self.saved > 60 * self.stage.settings.checkpoint_minutes
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(due), device=self.accelerator.device)
            due = self.accelerator.reduce(flag, "sum").item() > 0
        if due:
            self.checkpoint(step)

    def checkpoint(self, step: int) -> None:
        """Write the state after a step, all processes together.

        Raises:
            TosaError: there is nothing to go on from in it, or it cannot be written.
        """
        learnt = (each for each in self.stage.objective.parameters() if each.requires_grad)
        if not all(each.isfinite().all() for each in learnt):
            raise TosaError(f"the weights are not finite any more at step {step}; try a smaller --lr")
        fresh, kept = self.stage.out / f"{CHECKPOINT}.part", self.stage.out / CHECKPOINT
        if self.accelerator.is_main_process:
            _settle(fresh, kept)
        self.accelerator.wait_for_everyone()
        self._write(fresh)
        broken = sorted(set(gather_object(sorted(self.broken))))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            noted = {"stage": self.stage.name, "step": step, "processes": self.accelerator.num_processes}
            write_json(fresh / STEP_FILE, {**noted, **_draws(self.stage), "broken": broken})
            _settle(fresh, kept)
        self.accelerator.wait_for_everyone()
        self.saved = time.monotonic()

    def _write(self, folder: Path) -> None:
        """The state, and the average, which accelerate would pickle: what opens a pickle runs the code in it."""
        try:
            self.accelerator.save_state(str(folder))
            if self.average is not None and self.accelerator.is_main_process:
                save_model(self.average.module, str(folder / AVERAGE_FILE))
        except Exception as error:  # torch, accelerate and safetensors have one of their own for a full disk
            raise TosaError(
                f"cannot write a checkpoint to {folder}: {gist(error)}; check the free space, or choose another --out"
            ) from error
