"""Trains: launches the ranks, watches over them, and starts them again whatever happened. Begin at `train`.

The controller decides, node agents start and watch processes, the ranks do. Its state is what stands on storage: killed
and started again, it goes on from there.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import ray

from orchestrator.evaluation.pool import EvaluationPool
from orchestrator.evaluation.selection import out_of_patience, select
from orchestrator.training.failure_cause import find_cause, is_victim
from orchestrator.training.hang import blame, is_hung, stand
from orchestrator.training.progress import Failure, TrainOutcome, Watch, record_event
from orchestrator.training.worker_group import GroupReport, WorkerGroup, draining_nodes
from trainers.checkpoint.cleaning import remove_checkpoint
from trainers.checkpoint.reading import committed_steps
from trainers.checkpoint.retention import deletable
from trainers.errors import EvaluationError, Preempted, TrainingError, from_record
from trainers.records import Event
from trainers.run.log import RunLog
from trainers.run.record import Run
from trainers.storage import Folder
from trainers.tasks import Mode

POLL_S = 0.1
LOOK_EVERY_S = 1.0
"""How often hangs, new nodes and preemption notices are looked for."""
PLACE_WAIT_S = 300.0
"""How long lost room may take to come back before the run ends."""
LAST_WORDS_S, LOST_WAIT_S = 0.5, 3.0
"""After the first rank has failed: how long the others get to say more, and how long a lost node takes to show."""


@dataclass
class Controller:
    """What the rounds of one training share."""

    run: Run
    pool: EvaluationPool
    metric: tuple[str, Mode]
    log: RunLog
    on_event: Callable[[Event], None]
    asked_to_stop: Callable[[], bool]
    group: WorkerGroup
    watch: Watch = field(default_factory=Watch)
    looked: float = 0.0

    def note(self, event: Event) -> None:
        """Record an event and pass it on."""
        self.log.append(event)
        self.on_event(event)


def train(
    run: Run,
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
        PlacementError: where the cluster has no room for the smallest number of workers.
        TrainingError: where the restarts are used up.
        TuneyardError: what the ranks refused, with its own exit code.
    """
    group = WorkerGroup(run.job, gpus)
    controller = Controller(run, pool, metric, log, on_event, asked_to_stop, group)
    try:
        _train(controller)
    finally:
        group.close()
    watch = controller.watch
    assert watch.done is not None
    return TrainOutcome(steps=watch.done["step"], tokens=watch.tokens, restarts=max(watch.starts - 1, 0))


def _train(controller: Controller) -> None:
    """Launch until a launch ends well; failures in a row, with no new checkpoint between them, are counted."""
    watch, failures = controller.watch, 0
    while True:
        watch.done, commits = None, watch.commits
        controller.group.gather(PLACE_WAIT_S)
        failure = _launch(controller)
        if failure is None:
            if watch.done is not None and watch.done["stopped"] == "resize":
                continue
            return _check_stop(watch)
        failures = 1 if watch.commits > commits else failures + 1
        allowed = controller.run.job.scale.max_failures
        controller.note({"kind": "restart", "cause": failure.cause, "lost_nodes": list(failure.lost_nodes),
                         "failures": failures})  # fmt: skip
        if failures > allowed:
            raise TrainingError(
                f"training failed {failures} times in a row without a new checkpoint (scale.max_failures is "
                f"{allowed}). The last time, {failure.cause}"
            )
        controller.group.kill()


def _launch(controller: Controller) -> Failure | None:
    """One launch of the ranks, to its end. None where every rank ended well."""
    try:
        controller.group.launch(controller.run)
    except (ray.exceptions.RayError, TimeoutError) as error:
        lost = controller.group.look(LOST_WAIT_S).lost
        return Failure(f"a node went while the ranks were started: {_first_line(error)}", tuple(lost))
    while True:
        seen = _look(controller)
        if seen.lost:
            return Failure(f"lost the node {', '.join(node[:8] for node in seen.lost)}", tuple(seen.lost))
        if any(rank_exit.code for rank_exit in seen.exits):
            return _why(controller, seen)
        if len(seen.exits) == controller.group.size:
            return None
        failure = _steer(controller, seen)
        if failure is not None:
            return failure
        time.sleep(POLL_S)


def _look(controller: Controller, wait_s: float = POLL_S) -> GroupReport:
    """Look at the ranks, and take in what they and the evaluations say."""
    seen = controller.group.look(wait_s)
    for event in seen.events:
        controller.watch.note(event)
        if event["kind"] != "failed":
            controller.note(event)
    for record in controller.pool.collect():
        controller.note(record_event(record))
    return seen


def _why(controller: Controller, seen: GroupReport) -> Failure:
    """Who failed first, once the others have had their moment to say so."""
    began = time.monotonic()
    exits = {rank_exit.rank: rank_exit for rank_exit in seen.exits}
    while time.monotonic() - began < LAST_WORDS_S or (
        all(is_victim(one) for one in exits.values() if one.code) and time.monotonic() - began < LOST_WAIT_S
    ):
        time.sleep(POLL_S)
        seen = _look(controller)
        exits |= {rank_exit.rank: rank_exit for rank_exit in seen.exits}
        if seen.lost:
            return Failure(f"lost the node {', '.join(node[:8] for node in seen.lost)}", tuple(seen.lost))
    _check_refusal(controller.watch)
    if any(rank_exit.code == Preempted.exit_code for rank_exit in exits.values()):
        raise Preempted(
            f"a rank was told to go and could not commit within checkpoint.grace_s "
            f"({controller.run.job.checkpoint.grace_s:g} s); the same command goes on from the newest checkpoint"
        )
    return Failure(str(find_cause(list(exits.values()))))


def _steer(controller: Controller, seen: GroupReport) -> Failure | None:
    """One round of decisions while the ranks work; a failure where they hang."""
    job, group, pool = controller.run.job, controller.group, controller.pool
    if controller.asked_to_stop() or any(beat.told for beat in seen.beats.values()):
        group.ask_to_stop("preempted")
    patience = job.evaluate.early_stopping
    if patience and out_of_patience(pool.records, *controller.metric, patience.patience):
        group.ask_to_stop("early_stopping")
    due = time.monotonic() - controller.looked >= LOOK_EVERY_S
    checkpoints = controller.run.checkpoints
    if due or checkpoints.is_local:  # elsewhere each look is a request
        if job.evaluate.while_training:
            pool.start_where_free()
        prune_checkpoints(checkpoints, job.checkpoint.keep, pool, controller.metric)
    if not due:
        return None
    controller.looked = time.monotonic()
    _heed_notices(controller)
    if is_hung(seen.beats, job.scale.hang_after_s, controller.watch.step_times):
        return _report_hang(controller, seen)
    if group.size < job.scale.max_workers and controller.watch.step_times and group.can_grow():
        group.ask_to_stop("resize")
    return None


def _heed_notices(controller: Controller) -> None:
    """A node of ours is about to be taken away: go on without it where the job allows fewer workers, else stop."""
    group = controller.group
    going = draining_nodes() & group.layout.keys()
    if not going:
        return
    left = sum(len(ranks) for node, ranks in group.layout.items() if node not in going)
    if left >= controller.run.job.scale.min_workers:
        group.cordon(going)
        group.ask_to_stop("resize")
    else:
        group.ask_to_stop("preempted")


def _report_hang(controller: Controller, seen: GroupReport) -> Failure:
    """Name the rank that holds up the others, with its line, then have everything started again."""
    stacks = controller.group.stacks()
    standings = [stand(rank, beat, *stacks.get(rank, ("?", ""))) for rank, beat in sorted(seen.beats.items())]
    report = blame(standings)
    culprit = report.culprit
    place = {
        "rank": culprit.rank,
        "step": culprit.beat.step + 1,
        "phase": culprit.beat.phase,
        "line": str(culprit.line),
    }
    controller.note({"kind": "hang", **place, "report": str(report)})
    return Failure(f"the ranks hung for {min(beat.age_s for beat in seen.beats.values()):.0f} s: {report}")


def _check_refusal(watch: Watch) -> None:
    """Raise what a rank refused, with its own exit code: starting again would only repeat it."""
    if watch.refused is not None:
        raise from_record(watch.refused["error"])


def _check_stop(watch: Watch) -> None:
    """Raise Preempted where the ranks ended well, but early."""
    assert watch.done is not None, "every rank ended well without a word"
    if watch.done["stopped"] == "preempted":
        raise Preempted(
            f"stopped at step {watch.done['step']}, which is committed; the same command goes on from there"
        )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def prune_checkpoints(checkpoints: Folder, keep: int, pool: EvaluationPool, metric: tuple[str, Mode]) -> None:
    """Delete checkpoints that nothing needs: not among the newest, not the best, not being evaluated."""
    for step in deletable(committed_steps(checkpoints), keep, pinned_steps(pool, metric)):
        remove_checkpoint(checkpoints, step)


def pinned_steps(pool: EvaluationPool, metric: tuple[str, Mode]) -> set[int]:
    """Steps that must stay whatever their age."""
    try:
        best = {select(pool.records, *metric).step}
    except EvaluationError:
        best = set()
    return best | pool.running
