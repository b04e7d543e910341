"""What the stages of one `tuneyard run` share: Ray, signals, and the run folder with its lock, log and result."""

import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml

from orchestrator.evaluation.room import Place, check_room, place_evaluations
from orchestrator.planning.costs import weight_bytes
from orchestrator.planning.plan import Plan, plan_job
from orchestrator.planning.preflight import CheckedJob
from orchestrator.ray_session import ask_nodes, check_placement, gpu_memory, ray_session, smallest_gpu
from orchestrator.registry.lineage import lineage
from orchestrator.report.details import gather, measure_guesses
from orchestrator.report.index import write_index
from orchestrator.report.page import REPORT, render_report
from orchestrator.terminal.progress import Screen
from orchestrator.tracking.follower import Follower
from trainers.errors import JobError, Preempted, TuneyardError, describe, to_record
from trainers.evaluation.confusion import draw_confusion
from trainers.model.deepspeed_config import keeps_on_disk
from trainers.model.fit import count_parameters, tensor_shapes
from trainers.run.continued import read_line
from trainers.run.events import Event, StageEvent, StageStartEvent, StartEvent, read_events, steps_of
from trainers.run.folder import RESULT, SHARDS, Evaluation, RegisteredVersion, RunResult, read_result, run_folder
from trainers.run.goodput import account, share
from trainers.run.lock import LET_GO_S, own_folder
from trainers.run.log import RunLog
from trainers.run.record import Run, run_of
from trainers.shards.keys import load_shards
from trainers.storage import Folder
from trainers.tasks import choose_metric
from trainers.training.divergence import read_skipped
from trainers.worker.swap_folder import async_io_problem

Asked = Callable[[], bool]
"""Whether somebody wants the work to stop."""


class RunSession:
    """One command at work on one run; `run` and `log` are there while the run folder is held."""

    run: Run
    log: RunLog

    def __init__(self, checked: CheckedJob, screen: Screen, told_to_go: Asked = lambda: False) -> None:
        self.checked, self.screen, self._told_to_go = checked, screen, told_to_go
        self.metric = choose_metric(checked.job)
        self._began, self._steps = time.monotonic(), 0

    @contextmanager
    def hold(self, run: Run, wait_s: float = LET_GO_S) -> Iterator[None]:
        """Own the run folder for the length of the block; result.json says how the block ended, also where badly.

        Args:
            wait_s: how long another owner, such as a driver that was just killed, may take to let go.

        Raises:
            JobError: where another process is at work on it, or it cannot be locked.
        """
        folder, job = run.folder, run.job
        folder.write_bytes("job.yaml", yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False).encode())
        with own_folder(folder, wait_s):
            run.note_shards()
            self.run, self.log = run, RunLog(folder, draw_confusion, job, self.screen.say)
            with Follower(run, self.screen.say) as self._follower, closing(self.log):
                try:
                    self.note_stage("shard", time.monotonic() - self._began)
                    folder.write_bytes("plan.json", plan_here(self.checked).model_dump_json(indent=1).encode())
                    yield
                except BaseException as error:
                    ending = as_preempted(error, self._told_to_go)
                    self._record(ending)
                    if ending is error:
                        raise
                    raise ending from error

    def _record(self, error: BaseException) -> None:
        """Say in result.json how the run ended; what keeps that from storage is no reason to lose the cause."""
        if not isinstance(error, Exception):  # Ctrl-C
            return
        text = str(error) if isinstance(error, TuneyardError) else describe(to_record(error))
        try:
            self._end(self._summary("preempted" if isinstance(error, Preempted) else "failed", text))
        except Exception as unwritten:
            logging.getLogger(__name__).exception("the run's end could not be recorded")
            lost = f", and {lines} lines of its log are lost" if (lines := self.log.give_up()) else ""
            cause = describe(to_record(unwritten))
            self.screen.say(f"{self.run.folder}: {RESULT} could not be written{lost}: {cause}")

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the block's wall time to the stage, also where it ends with an exception."""
        began = time.monotonic()
        self.log.append(StageStartEvent(stage=stage))
        try:
            yield
        finally:
            self.note_stage(stage, time.monotonic() - began)

    def note_stage(self, stage: str, seconds: float) -> None:
        """Add wall time to a stage."""
        self.log.append(StageEvent(stage=stage, seconds=seconds))

    def steps(self, event: Event) -> int:
        """Steps of the whole run, as the ranks said at their start."""
        self._steps = (event.steps if isinstance(event, StartEvent) else None) or self._steps
        return self._steps

    def events(self) -> list[Event]:
        """Everything that happened so far, earlier attempts included."""
        return read_events(self.run.folder)

    def finish(self, evaluations: list[Evaluation], best: Evaluation, version: RegisteredVersion) -> RunResult:
        """Write result.json, then the report."""
        metric, _ = self.metric
        chosen = {"step": best.step, "metric": metric, "value": best.metrics[metric], "metrics": best.metrics}
        done = {"best": chosen, "registry": version, "evaluations": tuple(evaluations), "intervals": best.intervals}
        done |= {"baselines": measure_guesses(self.run, best.step)}
        return self._end(self._summary("done", None).model_copy(update=done))

    def _end(self, result: RunResult) -> RunResult:
        run = self.run
        run.folder.write_bytes(RESULT, result.model_dump_json(indent=1).encode())
        self._follower.word = "ended"
        try:
            self._write_pages(result)
        except Exception as error:  # how the run ended is on storage; a page that cannot be drawn does not undo it
            logging.getLogger(__name__).exception("the pages could not be written")
            self.screen.say(f"{run.folder}: its report could not be written: {type(error).__name__}: {error}")
        return result

    def _write_pages(self, result: RunResult) -> None:
        """The report of this run, and the index of all."""
        run = self.run
        parents = lineage(run.job, run.shards, run.model.digest, read_skipped(run.folder), read_line(run.folder))
        details = gather(run, result)
        page = render_report(run.folder, result, run.job, self.events(), run.shards, parents, details)
        run.folder.write_bytes(REPORT, page.encode())
        write_index(run.folder.parent)

    def _summary(self, status: Literal["done", "failed", "preempted"], error: str | None) -> RunResult:
        """What the log says of the run, over all attempts."""
        self.log.settle()
        events = self.events()
        seconds: dict[str, float] = {}
        for event in events:
            if isinstance(event, StageEvent):
                seconds[event.stage] = seconds.get(event.stage, 0.0) + event.seconds
        spent = account(events)
        last = next(iter(steps_of(events)[-1:]), None)
        return RunResult(
            status=status,
            error=error,
            steps=last.step if last else 0,
            tokens=last.tokens if last else 0,
            restarts=max(sum(isinstance(event, StartEvent) for event in events) - 1, 0),
            goodput=share(spent),
            accounting=spent,
            seconds=seconds,
        )


def finished_run(checked: CheckedJob) -> tuple[Folder, RunResult] | None:
    """Folder and result of a job whose run is done and registered under the job's name for it, or None."""
    shards = load_shards(checked.job, checked.splits)
    if shards is None:
        return None
    folder = run_folder(checked.job, checked.model.digest, shards)
    result = read_result(folder)
    if result is None or result.status != "done" or result.registry is None:
        return None
    if result.registry.model != (checked.job.registry.model or checked.job.name):
        return None
    if not folder.exists(SHARDS):  # a run of an earlier version
        run_of(checked.job, checked.model, shards).note_shards()
    return folder, result


@contextmanager
def open_session(checked: CheckedJob, address: str | None, screen: Screen) -> Iterator[RunSession]:
    """Ray with room for the workers, a screen, and SIGTERM as an orderly end, for the length of the block."""
    with _stopped_by_sigterm() as told, ray_session(address) as ray, screen.live():
        if keeps_on_disk(checked.job.train.deepspeed):
            check_disks(ask_nodes(ray, async_io_problem))
        gpus = check_placement(checked.job.scale)  # before hours of sharding, and again after them: nodes come and go
        note = check_room(checked.job, evaluation_place(checked, gpus, ray.cluster_resources()))
        if note:
            screen.say(f"note: {note}")
        screen.metric = choose_metric(checked.job)[0]
        yield RunSession(checked, screen, told)


def check_disks(problems: Sequence[str | None]) -> None:
    """Raises JobError where a node cannot keep state on disk."""
    if found := list(filter(None, problems)):
        raise JobError(found)


def plan_here(checked: CheckedJob) -> Plan:
    """The plan with the GPUs of the cluster that the job runs on, which may not be those of this machine."""
    import ray

    told = smallest_gpu(ray) if checked.job.scale.gpus_per_worker != 0 else None
    return plan_job(checked, None if told == gpu_memory() else told)


def evaluation_place(checked: CheckedJob, gpus: int, resources: dict[str, float]) -> Place:
    """Where checkpoints are evaluated on this cluster while the training runs."""
    import ray

    parameters = count_parameters(tensor_shapes(Path(checked.model.path)))
    size, device_bytes = weight_bytes(checked.job, parameters), smallest_gpu(ray) if gpus else None
    return place_evaluations(checked.job, gpus, resources, size, device_bytes)


@contextmanager
def _stopped_by_sigterm() -> Iterator[Asked]:
    """SIGTERM outside the training ends the run at once: every other stage is taken up where it was.

    The handler raises KeyboardInterrupt, the one exception that a wait in Ray's C code ends for; with another it goes
    on waiting and raises SystemError. Only the first signal raises: a second must not cut off what the first leaves.

    Raises:
        Preempted: after such a signal.
    """
    told: list[int] = []

    def stop(number: int, _: Any) -> None:
        told.append(number)
        if len(told) == 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield lambda: bool(told)
    except BaseException as error:
        ending = as_preempted(error, lambda: bool(told))
        if ending is error:
            raise
        raise ending from error
    finally:
        signal.signal(signal.SIGTERM, before)


def as_preempted(error: BaseException, told_to_go: Asked) -> BaseException:
    """What an exception means: after SIGTERM whatever its interrupt became is Preempted, without it, it is itself."""
    if isinstance(error, TuneyardError | GeneratorExit) or not told_to_go():
        return error
    return Preempted("stopped by SIGTERM; the same command goes on from there")


@contextmanager
def stop_asked_for() -> Iterator[Asked]:
    """Whether SIGTERM or Ctrl-C came; a second Ctrl-C ends at once."""
    signalled: list[float] = []

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGINT and signalled:
            raise KeyboardInterrupt
        signalled.append(time.time())

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(signalled)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
