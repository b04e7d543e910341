"""Launches the ranks through Ray Train and watches over them: events, evaluations beside, retention, early stopping.

The controller decides, Ray Train places and restarts, the ranks do. Its state is what stands on storage: killed and
started again, it goes on from there.
"""

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from orchestrator.evaluation_pool import EvaluationPool
from orchestrator.mailbox import Event, Mailbox, RayHooks
from orchestrator.selection import Mode, out_of_patience, select
from trainers.checkpoint.cleaning import remove_checkpoint
from trainers.checkpoint.reading import committed_steps
from trainers.checkpoint.retention import deletable
from trainers.errors import EvaluationError, Preempted, TrainingError, TuneyardError
from trainers.rank import TrainRequest, run_rank
from trainers.run_log import RunLog, read_events
from trainers.runs import Evaluation
from trainers.storage import Folder

POLL_S = 0.1


@dataclass(frozen=True)
class TrainOutcome:
    """What the training stage leaves behind, beside the checkpoints."""

    steps: int
    tokens: int
    restarts: int
    seconds: float
    productive_s: float
    """Time of the steps that were kept."""


@dataclass
class Watch:
    """What the controller has heard from the ranks so far."""

    starts: int = 0
    tokens: int = 0
    step_seconds: dict[int, float] = field(default_factory=dict)
    done: Event | None = None
    refused: Event | None = None

    def note(self, event: Event) -> None:
        """Take in one event."""
        if event["kind"] == "start":
            self.starts += 1
        elif event["kind"] == "step":
            self.step_seconds[event["step"]] = event["step_s"]
            self.tokens = event["tokens"]
        elif event["kind"] == "done":
            self.done = event
        elif event["kind"] == "refused":
            self.refused = self.refused or event


def finished_training(run: Folder) -> Event | None:
    """The event that ended this run's training for good, if its last checkpoint is there."""
    ends = [event for event in read_events(run) if event["kind"] == "done" and event["stopped"] != "preempted"]
    return ends[-1] if ends and ends[-1]["step"] in committed_steps(run / "checkpoints") else None


def train(
    request: TrainRequest,
    pool: EvaluationPool,
    metric: tuple[str, Mode],
    gpus: int,
    log: RunLog,
    on_event: Callable[[Event], None],
    asked_to_stop: Callable[[], bool],
) -> TrainOutcome:
    """Train to the last step, from the newest committed checkpoint on.

    Args:
        pool: evaluates beside the training; what is still in flight at its end goes on.
        gpus: GPUs per worker.
        asked_to_stop: whether the user or the machine wants the run to stop; then the step in hand is committed.

    Raises:
        Preempted: after such a stop.
        TrainingError: where the restarts are used up.
        TuneyardError: what the ranks refused, with its own exit code.
    """
    began = time.monotonic()
    mailbox, watch = Mailbox(), Watch()
    fit = _Fit(request, gpus, mailbox)
    while True:
        ended = not fit.is_alive()  # before the last fetch, so that no event is lost
        for event in mailbox.fetch():
            watch.note(event)
            log.append(event)
            on_event(event)
        for record in pool.collect():
            log.append(record_event(record))
            on_event(record_event(record))
        if ended:
            break
        _steer(request, pool, mailbox, metric, asked_to_stop)
        time.sleep(POLL_S)
    return _outcome(watch, fit.error, time.monotonic() - began)


def record_event(record: Evaluation) -> Event:
    """An evaluation as an event of the run's log."""
    return {
        "kind": "evaluation",
        "step": record.step,
        "status": record.status,
        "metrics": record.metrics,
        "error": record.error,
    }


def _steer(
    request: TrainRequest,
    pool: EvaluationPool,
    mailbox: Mailbox,
    metric: tuple[str, Mode],
    asked_to_stop: Callable[[], bool],
) -> None:
    """One round of decisions while the ranks work."""
    job = request.job
    if asked_to_stop():
        mailbox.ask_to_stop("preempted")
    elif job.evaluate.early_stopping and out_of_patience(pool.records, *metric, job.evaluate.early_stopping.patience):
        mailbox.ask_to_stop("early_stopping")
    if job.evaluate.while_training:
        pool.start_where_free()
    thin_out(request.run, job.checkpoint.keep, pool, metric)


def thin_out(run: Folder, keep: int, pool: EvaluationPool, metric: tuple[str, Mode]) -> None:
    """Delete checkpoints that nothing needs: not among the newest, not the best, not being evaluated."""
    checkpoints = run / "checkpoints"
    for step in deletable(committed_steps(checkpoints), keep, pinned_steps(pool, metric)):
        remove_checkpoint(checkpoints, step)


def pinned_steps(pool: EvaluationPool, metric: tuple[str, Mode]) -> set[int]:
    """Steps that must stay whatever their age."""
    try:
        best = {select(pool.records, *metric).step}
    except EvaluationError:
        best = set()
    return best | pool.running


class _Fit(threading.Thread):
    """Ray Train's blocking `fit`, beside the controller's loop."""

    def __init__(self, request: TrainRequest, gpus: int, mailbox: Mailbox) -> None:
        super().__init__(daemon=True, name="fit")
        self.error: BaseException | None = None
        self._trainer = _make_trainer(request, gpus, mailbox)
        self.start()

    def run(self) -> None:
        """Fit, and keep what it raises."""
        try:
            self._trainer.fit()
        except BaseException as error:
            self.error = error


def _make_trainer(request: TrainRequest, gpus: int, mailbox: Mailbox) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    scale = request.job.scale
    elastic = scale.min_workers != scale.max_workers
    return TorchTrainer(
        _work,
        train_loop_config={"request": request, "mailbox": mailbox.actor},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=600),
        scaling_config=ScalingConfig(
            num_workers=(scale.min_workers, scale.max_workers) if elastic else scale.max_workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": scale.cpus_per_worker, **({"GPU": gpus} if gpus else {})},
            placement_strategy="PACK",
        ),
        run_config=RunConfig(
            name=f"attempt-{uuid.uuid4().hex[:8]}",
            storage_path=str(request.run / "logs" / "ray"),
            failure_config=FailureConfig(max_failures=scale.max_failures),
        ),
    )


def _work(config: dict[str, Any]) -> None:
    """What Ray runs on each rank: the bridge to `trainers`."""
    hooks = RayHooks(config["mailbox"])
    if hooks.ask_now() == "refused":  # a restart after a refusal would only repeat it
        return
    try:
        run_rank(config["request"], hooks)
    except TuneyardError as error:
        hooks.emit({"kind": "refused", "error": str(error), "exit_code": error.exit_code})
        raise


def _outcome(watch: Watch, error: BaseException | None, seconds: float) -> TrainOutcome:
    """Turn what was heard into a record or the right error."""
    if watch.refused is not None:
        raise _refusal(watch.refused)
    if watch.done is None:
        raise TrainingError(f"training ended before its last step: {explain_failure(error)}")
    if watch.done["stopped"] == "preempted":
        raise Preempted(
            f"stopped at step {watch.done['step']}, which is committed; the same command goes on from there"
        )
    return TrainOutcome(
        steps=watch.done["step"],
        tokens=watch.tokens,
        restarts=max(watch.starts - 1, 0),
        seconds=seconds,
        productive_s=sum(watch.step_seconds.values()),
    )


def _refusal(event: Event) -> TuneyardError:
    error = TuneyardError(event["error"])
    error.exit_code = event["exit_code"]
    return error


def explain_failure(error: BaseException | None) -> str:
    """The first failing rank and its own words, out of what Ray Train raises."""
    failures = getattr(error, "worker_failures", None)
    if not failures:
        return f"{type(error).__name__}: {error}" if error else "the ranks left without a word"
    rank, cause = min(failures.items())
    return f"rank {rank} of {len(failures)} failed: {_last_line(cause)}"


def _last_line(cause: BaseException) -> str:
    """What the innermost exception says; Ray wraps it into a printed traceback."""
    inner = getattr(cause, "cause", None) or cause
    lines = [line for line in str(inner).splitlines() if line.strip()]
    return f"{type(inner).__name__}: {lines[-1] if lines else ''}"
