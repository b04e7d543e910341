"""The training loop of one rank, shared by every task and launcher. Begin at `train`.

It knows steps, not files or launchers: data comes from `StepSource`, progress leaves through `Hooks`.
"""

import errno
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

from trainers.architecture.layer_drop import seed_layer_drop
from trainers.batching.batches import StepBatch, StepSource
from trainers.checkpoint.records import Progress
from trainers.known_masks import masks_known
from trainers.model.world import World
from trainers.records import STOPS, StopReason
from trainers.run.events import StepEvent, StragglerEvent
from trainers.training.divergence import Diverged, divergence
from trainers.training.hooks import Evaluate, Hooks, Objective, Saver
from trainers.training.schedule import Schedule
from trainers.training.straggler import ComputeSampler, Straggler, StragglerDetector

HISTORY = 1000
"""Steps whose events a checkpoint carries."""


@dataclass(frozen=True)
class LoopSettings:
    """What the loop needs of the job."""

    steps: int
    every_steps: int
    """Steps between checkpoints."""
    seed: int
    spike_factor: float | None = None
    """A loss over this many times the largest of the last HISTORY steps has diverged."""
    skip: frozenset[int] = frozenset()
    """Steps, counted from 0, that pass without training."""
    until: int | None = None
    """Pause after this step; None goes on to the last."""

    @property
    def end(self) -> int:
        """The step after which this launch ends."""
        return self.steps if self.until is None else min(self.until, self.steps)


@dataclass(frozen=True)
class LoopOutcome:
    """How the loop ended."""

    progress: Progress
    stopped: StopReason | None
    """The stop reason, or None where every step is done."""


@dataclass(frozen=True)
class Agreed:
    """What ranks say of the next step at the end of one, so that it begins without asking again."""

    ready: bool
    """Its batch is there: nobody would have to wait, and be asked to stop meanwhile."""
    stop: StopReason | None


NOTHING = Agreed(False, None)
"""So they are asked."""


def train(
    engine: Any,
    objective: Objective,
    source: StepSource,
    schedule: Schedule,
    settings: LoopSettings,
    start: Progress,
    world: World,
    hooks: Hooks,
    saver: Saver,
    evaluate: Evaluate,
) -> LoopOutcome:
    """Run steps start.step ... settings.end, saving every `every_steps` and at the end.

    Raises:
        Diverged: on every rank, before anything of the step is saved.
        OSError: on rank 0, if the last step is not committed: the steps since the newest checkpoint would be lost.
    """
    step, tokens, stopped, saved, worked = start.step, start.tokens, None, start.step, 0.0
    history = deque(start.history, maxlen=HISTORY)
    stragglers, agreed = StragglerDetector(world.size), NOTHING
    with closing(ComputeSampler()) as meter:
        while step < settings.end:
            began = time.perf_counter()
            waited, stopped = _wait_for_data(source, step, agreed, hooks, world)
            if stopped:
                break
            hooks.at("step", step)
            if step in settings.skip:
                step, agreed = step + 1, NOTHING
                continue
            seed_step(settings.seed, step, world.rank)
            seed_layer_drop(engine, settings.seed, step)
            set_learning_rate(engine, schedule.rate(step))
            batch = source.next(step)
            loss_sum = run_micro_batches(engine, objective, batch, world, partial(_before_update, saver, hooks, step))
            hooks.at("settle", step)
            ahead, norm = Agreed(source.is_ready(step + 1), hooks.stop_reason()), engine.get_global_grad_norm()
            loss, norm, busy, agreed = _settle(loss_sum / batch.targets, norm, worked, ahead, world)
            seconds = time.perf_counter() - began
            worked = seconds * meter.share()
            wrong = divergence(loss, norm, [event.loss for event in history], settings.spike_factor)
            if wrong:
                raise Diverged(step, loss, wrong)
            step, tokens = step + 1, tokens + batch.tokens
            history.append(_step_event(step, loss, schedule.rate(step - 1), norm, batch, seconds, waited, tokens))
            _tell(hooks, history[-1], stragglers.note(seconds, busy), world)
            if step == settings.end or step % settings.every_steps == 0:
                saved, agreed = _save(Progress(step, tokens, tuple(history)), hooks, saver, evaluate), NOTHING
                meter.share()  # what stands between two steps belongs to neither
            saver.poll()
    if saved != step:
        _save(Progress(step, tokens, tuple(history)), hooks, saver, evaluate)
    hooks.at("commit", step)
    saver.finish()
    if world.rank == 0 and step > start.step and saver.committed != step:
        raise OSError(errno.EIO, f"the checkpoint of step {step}, the last, was not committed")
    return LoopOutcome(Progress(step, tokens), None if step >= settings.steps else stopped or "paused")


def _wait_for_data(
    source: StepSource, step: int, agreed: Agreed, hooks: Hooks, world: World
) -> tuple[float, StopReason | None]:
    """Seconds until a step's batch was there, and why to stop before the step."""
    began = time.perf_counter()
    hooks.at("data", step)
    source.ready(step, hooks.stop_reason)
    waited = time.perf_counter() - began
    return waited, agreed.stop if agreed.ready else agree_to_stop(hooks.stop_reason(), world)


def _save(progress: Progress, hooks: Hooks, saver: Saver, evaluate: Evaluate) -> int:
    """Begin to save, and evaluate the same state where the ranks do that. Returns its step."""
    hooks.at("save", progress.step)
    saver.save(progress)
    evaluate(progress.step)
    return progress.step


def _before_update(saver: Saver, hooks: Hooks, step: int) -> None:
    """Wait for the save that reads the state, in the phase of saving: offloaded state is written from where it lies."""
    if saver.reading:
        hooks.at("save", step)
        saver.before_update()
        hooks.at("step", step)
    else:
        saver.before_update()


def _tell(hooks: Hooks, event: StepEvent, straggler: Straggler | None, world: World) -> None:
    """Rank 0 reports a step, and the rank that the others waited for."""
    if world.rank == 0:
        hooks.emit(event)
        if straggler:
            hooks.emit(StragglerEvent(step=event.step, rank=straggler.rank, lag_s=straggler.lag_s))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout and the like draw from (seed, step, rank): there is no generator state to save or lose."""
    import numpy as np
    import torch

    number = int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)
    if torch.cuda.is_initialized():
        torch.manual_seed(number)
    else:  # torch.manual_seed keeps the stack for each kind of device that there is not: 0.8 ms
        torch.default_generator.manual_seed(number)


def set_learning_rate(engine: Any, rate: float) -> None:
    """Set the rate of every parameter group for the coming update; groups may learn at a share of it."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def run_micro_batches(
    engine: Any, objective: Objective, batch: StepBatch, world: World, before_update: Callable[[], None]
) -> Any:
    """Forward and backward over the accumulation, then the update. Returns this rank's loss sum, on its device: nothing
    here waits for a GPU, so the host goes on launching.

    DeepSpeed averages gradients over ranks, so a loss of sum x world / targets gives the gradient of
    (sum over the whole step) / (targets of the whole step), however the step is cut up.
    """
    import torch

    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for place, micro in enumerate(batch.micro_batches, 1):
        last = place == len(batch.micro_batches)
        engine.set_gradient_accumulation_boundary(last)
        with masks_known(micro.mask_facts()):
            loss_sum = objective.step_loss(engine, *micro.to(world.device), micro.targets(world.device))
        engine.backward(share_of_step(loss_sum, batch.targets, world.size), scale_wrt_gas=False)
        if last:
            before_update()
        engine.step()
        total += loss_sum.detach()
    return total


def share_of_step(loss_sum: Any, targets: int, world_size: int) -> Any:
    """What a micro-batch adds to the step's mean loss, times the world size, by which DeepSpeed divides gradients."""
    return loss_sum * (world_size / targets)


def agree_to_stop(reason: StopReason | None, world: World) -> StopReason | None:
    """Whether any rank was asked to stop, and why: the same answer on every rank."""
    import torch
    import torch.distributed as dist

    if world.size == 1:
        return reason
    votes = torch.tensor([float(reason == name) for name in STOPS], device=world.device)
    dist.all_reduce(votes)
    return _elected(votes.tolist())


def _elected(votes: Sequence[float]) -> StopReason | None:
    """The first reason that any rank gave."""
    return next((name for name, count in zip(STOPS, votes, strict=True) if count), None)


def _settle(
    loss: Any, norm: Any, worked_s: float, ahead: Agreed, world: World
) -> tuple[float, float, Sequence[float], Agreed]:
    """The loss summed over ranks, the norm, how long each rank worked in the step before, and whether the next step may
    begin at once: one collective, and the one place where a step waits for a GPU to finish.

    Args:
        loss: of this rank, a scalar on the device.
        norm: the same on every rank; a scalar on the device, a number or None.
        ahead: what this rank says of the next step.
    """
    import torch
    import torch.distributed as dist

    shared = torch.zeros(3 + world.size + len(STOPS), dtype=torch.float64, device=world.device)
    shared[0], shared[2 + world.rank], shared[2 + world.size] = loss, worked_s, float(ahead.ready)
    if ahead.stop:
        shared[3 + world.size + STOPS.index(ahead.stop)] = 1.0
    if world.size > 1:
        dist.all_reduce(shared)
    shared[1] = 0.0 if norm is None else norm
    total, of_norm, *rest = shared.tolist()
    busy, (ready, *votes) = rest[: world.size], rest[world.size :]
    return total, of_norm, busy, Agreed(ready == world.size, _elected(votes))


def _step_event(
    step: int, loss: float, rate: float, norm: float, batch: StepBatch, seconds: float, waited: float, tokens: int
) -> StepEvent:
    return StepEvent(
        step=step,
        loss=loss,
        learning_rate=rate,
        grad_norm=norm,
        tokens=tokens,
        tokens_per_s=batch.tokens / seconds,
        step_s=seconds,
        data_wait_s=waited,
        memory_gib=peak_memory_gib(),
    )


def peak_memory_gib() -> float:
    """Peak memory of this rank: of the GPU where there is one, else resident memory."""
    device, host = peak_memory()
    return host if device is None else device


def peak_memory() -> tuple[float | None, float]:
    """GiB that this rank's tensors had of its GPU at the most, None without one; and resident of its process."""
    import resource

    import torch

    device = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    return device, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
