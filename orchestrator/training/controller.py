"""Trains: launches the ranks, watches over them, and starts them again whatever happened. Begin at `train`.

The controller decides, node agents start and watch processes, the ranks do. Its state is what stands on storage: killed
and started again, it goes on from there.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import ray

from orchestrator.evaluation.pool import EvaluationPool
from orchestrator.training.failure_cause import find_cause, is_victim, lasting_error
from orchestrator.training.hang import blame, is_hung, stand
from orchestrator.training.node_report import NodeReport
from orchestrator.training.restart import Failure, pause_s, why_end
from orchestrator.training.worker_group import WorkerGroup, draining_nodes
from trainers.checkpoint.reading import committed_steps
from trainers.errors import Preempted, TrainingError, from_record
from trainers.run.events import (
    CheckpointEvent,
    DoneEvent,
    EvaluationEvent,
    Event,
    HangEvent,
    RefusedEvent,
    RestartEvent,
    StartEvent,
    StepEvent,
    read_events,
)
from trainers.run.folder import evaluation_event
from trainers.run.log import RunLog
from trainers.run.record import Run
from trainers.storage import Folder

POLL_S = 0.1
LOOK_EVERY_S = 1.0
"""Seconds between looks for hangs, free room, new nodes and preemption notices."""
PLACE_WAIT_S = 300.0
"""How long lost room may take to come back before the run ends."""
LAST_WORDS_S, LOST_WAIT_S = 0.5, 3.0
"""Seconds to collect further exits after the first, so that the root cause is not taken from the first to report; and
seconds until a lost node shows, if all that reported are victims."""
GOES_ON = ("preempted", "resize", "paused")
"""Reasons to stop after which the training is not over."""


@dataclass
class Controller:
    """What the launches of one training share."""

    run: Run
    pool: EvaluationPool
    log: RunLog
    on_event: Callable[[Event], None]
    asked_to_stop: Callable[[], bool]
    group: WorkerGroup
    looked: float = 0.0
    judged: float = 0.0
    """When the ranks were last looked at for a hang."""
    changed: bool = True
    """Whether checkpoints or evaluations came since the last decision about them."""
    step_times: list[float] = field(default_factory=list)
    step: int = 0
    """Seconds of the steps of this launch."""
    commits: int = 0
    done: DoneEvent | None = None
    refused: RefusedEvent | None = None

    def note(self, event: Event) -> None:
        """Take in an event, record it and pass it on."""
        match event:
            case StartEvent():
                self.step_times.clear()
            case StepEvent():
                self.step_times.append(event.step_s)
                self.step = event.step
            case CheckpointEvent():
                self.commits, self.changed = self.commits + 1, True
            case EvaluationEvent():
                self.changed = True
            case DoneEvent():
                self.done = event
            case RefusedEvent():
                self.refused = self.refused or event
        self.pool.note(event)
        self.log.append(event)
        self.on_event(event)


def train(
    run: Run,
    pool: EvaluationPool,
    group: WorkerGroup,
    log: RunLog,
    on_event: Callable[[Event], None],
    asked_to_stop: Callable[[], bool],
) -> None:
    """Train to the last step, from the newest committed checkpoint on.

    Args:
        pool: evaluates beside the training; what is still in flight at its end goes on.
        group: who gives it ends it, with what a failure leaves of the ranks.
        asked_to_stop: whether the user or the machine wants the run to stop; then the step in hand is committed.

    Raises:
        Preempted: after such a stop.
        PlacementError: the cluster has no room for the smallest number of workers.
        TrainingError: the restarts are used up.
        TuneyardError: what the ranks refused, with its own exit code.
    """
    _train(Controller(run, pool, log, on_event, asked_to_stop, group))


def _train(controller: Controller) -> None:
    """Launch until a launch ends well; failures in a row, with no new checkpoint between them, are counted."""
    failures, before = 0, None
    while True:
        controller.done, commits = None, controller.commits
        controller.step_times.clear()
        controller.group.gather(PLACE_WAIT_S, controller.asked_to_stop)
        failure = _launch(controller)
        if failure is None:
            done = controller.done
            assert done is not None, "every rank ended well without a word"
            if done.stopped == "resize":
                continue
            if done.stopped == "preempted":
                raise Preempted(f"stopped at step {done.step}, which is committed; the same command goes on from there")
            return
        failures = 1 if controller.commits > commits else failures + 1
        controller.note(RestartEvent(cause=failure.cause, lost_nodes=failure.lost_nodes, failures=failures))
        failure = replace(failure, step=controller.step if controller.step_times else None)
        end = why_end(failure, before, failures, controller.run.job.scale.max_failures)
        if end:
            raise TrainingError(end)
        before = failure
        controller.group.kill()
        resume_at = time.monotonic() + pause_s(failure, failures)
        while time.monotonic() < resume_at and not controller.asked_to_stop():
            time.sleep(POLL_S)


def _launch(controller: Controller) -> Failure | None:
    """One launch of the ranks, to its end. None if every rank ended well."""
    try:
        controller.group.launch(controller.run)
    except (ray.exceptions.RayError, TimeoutError) as error:
        lost = controller.group.report(LOST_WAIT_S).lost
        first_line = (str(error).splitlines() or [""])[0]
        return Failure(f"a node went while the ranks were started: {type(error).__name__}: {first_line}", tuple(lost))
    while True:
        report = _collect(controller)
        if report.lost:
            return _lost(report)
        if any(rank_exit.code for rank_exit in report.exits):
            return _explain(controller, report)
        if len(report.exits) == controller.group.size:
            return None
        failure = _steer(controller, report)
        if failure is not None:
            return failure
        time.sleep(POLL_S)


def _collect(controller: Controller) -> NodeReport:
    """Take in what the ranks and the evaluations report."""
    report = controller.group.report(POLL_S)
    for event in report.events:
        controller.note(event)
    for record in controller.pool.collect():
        controller.note(evaluation_event(record))
    return report


def _lost(report: NodeReport) -> Failure:
    return Failure(f"lost the node {', '.join(node[:8] for node in report.lost)}", tuple(report.lost))


def _explain(controller: Controller, report: NodeReport) -> Failure:
    """Who failed first, once the others have had the time to report too.

    Raises:
        TuneyardError: what a rank refused, with its own exit code: starting again would only repeat it.
        Preempted: a rank had to go before it could commit.
    """
    began = time.monotonic()
    exits = {rank_exit.rank: rank_exit for rank_exit in report.exits}
    while time.monotonic() - began < LAST_WORDS_S or (
        all(is_victim(rank_exit) for rank_exit in exits.values() if rank_exit.code)
        and time.monotonic() - began < LOST_WAIT_S
    ):
        time.sleep(POLL_S)
        report = _collect(controller)
        exits |= {rank_exit.rank: rank_exit for rank_exit in report.exits}
        if report.lost:
            return _lost(report)
    if controller.refused is not None:
        raise from_record(controller.refused.error)
    if any(rank_exit.code == Preempted.exit_code for rank_exit in exits.values()):
        raise Preempted(
            f"a rank was told to go and could not commit within checkpoint.grace_s "
            f"({controller.run.job.checkpoint.grace_s:g} s); the same command goes on from the newest checkpoint"
        )
    return Failure(str(find_cause(list(exits.values()))), error=lasting_error(list(exits.values())))


def _steer(controller: Controller, report: NodeReport) -> Failure | None:
    """One round of decisions while the ranks work; a failure where they hang."""
    job, group, pool = controller.run.job, controller.group, controller.pool
    if controller.asked_to_stop() or any(beat.told for beat in report.beats.values()):
        group.ask_to_stop("preempted")
    if _hangs(controller, report):
        return _report_hang(controller, report)
    due = time.monotonic() - controller.looked >= LOOK_EVERY_S
    if controller.changed or due:
        if job.evaluate.while_training and job.evaluate.on == "free":
            pool.start_where_free()
        if controller.changed:
            pool.prune()
            if pool.out_of_patience():
                group.ask_to_stop("early_stopping")
        controller.changed = False
    if not due:
        return None
    controller.looked = time.monotonic()
    _heed_notices(group, job.scale.min_workers)
    if group.size < job.scale.max_workers and controller.step_times and group.can_grow():
        group.ask_to_stop("resize")
    return None


def _hangs(controller: Controller, report: NodeReport) -> bool:
    """Looked at now and then, and only with a word of every rank: those that wait do not move, and the one that they
    wait for may be on a node whose answer is late."""
    now = time.monotonic()
    whole = len(report.beats) + len(report.exits) == controller.group.size
    if not whole or now - controller.judged < LOOK_EVERY_S:
        return False
    controller.judged = now
    return is_hung(report.beats, controller.run.job.scale.hang_after_s, controller.step_times)


def _heed_notices(group: WorkerGroup, min_workers: int) -> None:
    """A node of ours is about to be taken away: go on without it where the job allows fewer workers, else stop."""
    going = draining_nodes() & group.layout.keys()
    if not going:
        return
    if sum(len(ranks) for node, ranks in group.layout.items() if node not in going) >= min_workers:
        group.cordon(going)
        group.ask_to_stop("resize")
    else:
        group.ask_to_stop("preempted")


def _report_hang(controller: Controller, report: NodeReport) -> Failure:
    """Name the rank that holds up the others, with its line, then have everything started again."""
    stacks = controller.group.stacks()
    hang = blame([stand(rank, beat, *stacks.get(rank, ("?", ""))) for rank, beat in sorted(report.beats.items())])
    rank, beat = hang.culprit.rank, hang.culprit.beat
    line = str(hang.culprit.line)
    controller.note(HangEvent(rank=rank, step=beat.step + 1, phase=beat.phase, line=line, report=str(hang)))
    return Failure(f"the ranks hung for {min(beat.age_s for beat in report.beats.values()):.0f} s: {hang}")


def finished_training(run: Folder, checkpoints: Folder) -> DoneEvent | None:
    """The event that ended this run's training for good, if its last checkpoint is there."""
    ends = [event for event in read_events(run) if isinstance(event, DoneEvent) and event.stopped not in GOES_ON]
    return ends[-1] if ends and ends[-1].step in committed_steps(checkpoints) else None
