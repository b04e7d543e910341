"""Whatever happens to a rank, the controller brings the run to its end, with the losses of an undisturbed one."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orchestrator.training.worker_group import WorkerGroup
from tests.recovery import events_of, losses, rank_processes, run_training, with_
from tests.tiny import film_rows, make_bert, shard_locally, tiny_job
from trainers.checkpoint.reading import committed_steps
from trainers.errors import Preempted, TrainingError, TuneyardError
from trainers.job.schema import EarlyStopping, Job
from trainers.run.events import Event, StepEvent
from trainers.storage import Folder

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.usefixtures("ray_session")]
STEPS = 12


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Job:
    folder = tmp_path_factory.mktemp("recovery")
    job: Job = tiny_job(
        folder,
        make_bert(folder / "model", tiny_tokenizer),
        "classify",
        film_rows(120),
        train={"steps": STEPS, "learning_rate": 1e-3, "schedule": "constant"},  # more steps begin as fewer do
        scale={"workers": 2},
        checkpoint={"every_steps": 4},
        evaluate={"while_training": False},
    )
    shard_locally(job)
    return job


@pytest.fixture(scope="module")
def train(job: Job, ray_session: None) -> Iterator[Callable[..., Path]]:
    """`run_training`, each time with the same node agents: one that starts takes 7 s of CPU for imports."""
    with closing(WorkerGroup(job, 0)) as group:
        yield partial(run_training, group=group)


@pytest.fixture(scope="module")
def undisturbed(job: Job, train: Callable[..., Path]) -> dict[int, float]:
    found = losses(train(job, "undisturbed"))
    assert set(found) == set(range(1, STEPS + 1))
    return found


def test_a_rank_that_is_killed_or_raises_is_named_and_the_run_ends_as_if_nothing_had_been(
    job: Job, train: Callable[..., Path], undisturbed: dict[int, float]
) -> None:
    faults = [
        {"kind": "kill", "rank": 1, "step": 5},
        {"kind": "raise", "rank": 0, "step": 6},
        {"kind": "memory", "rank": 1, "step": 9},
        {"kind": "mismatch", "rank": 0, "step": 10},
    ]
    patient = with_(job, scale={"max_failures": 4})  # whether a checkpoint lies between two of them is a race
    run = train(patient, "failing", *faults)
    assert losses(run) == undisturbed
    causes = [event.cause for event in events_of(run, "restart")]
    assert "rank 1" in causes[0]
    assert "was killed by SIGKILL" in causes[0]
    assert "rank 0" in causes[1]
    assert "not on speaking terms" in causes[1]
    assert "sitecustomize.py" in causes[1]
    assert "cannot allocate 1 TiB" in causes[2]
    assert "train.micro_batch_size" in causes[2]
    assert "collective mismatch" in causes[3]
    assert "A rank left out a collective" in causes[3]
    assert "loop.py:" in causes[3]
    assert len(causes) == 4
    starts = [event.step for event in events_of(run, "start")]
    assert starts == sorted(starts)
    assert set(starts) <= {0, 4, 8}  # a checkpoint that was still being written when its rank died is lost
    assert "not on speaking terms" in (run / "logs" / "rank-00000.log").read_text()


def test_ranks_killed_while_they_evaluate_evaluate_that_checkpoint_once(
    job: Job, train: Callable[..., Path], undisturbed: dict[int, float]
) -> None:
    """No core is free beside them. The controller hears of their evaluations, and a metric that stays ends the run."""
    evaluate = {"while_training": True, "on": "ranks", "batch_size": 4}
    run = train(with_(job, evaluate=evaluate), "evaluating", {"kind": "kill_evaluating", "rank": 1, "step": 3})
    assert losses(run) == undisturbed
    (restart,) = events_of(run, "restart")
    assert "rank 1" in restart.cause and "was killed by SIGKILL" in restart.cause
    evaluations = events_of(run, "evaluation")
    assert [event.step for event in evaluations] == [4, 8, 12]
    assert all(event.status == "done" and event.held_s > 0 for event in evaluations)

    stopping = evaluate | {"early_stopping": EarlyStopping(patience=1)}
    still = with_(job, evaluate=stopping, train={"learning_rate": 1e-12, "steps": 4000}, checkpoint={"keep": 1})
    stopped = train(still, "patient")
    (done,) = events_of(stopped, "done")
    assert done.stopped == "early_stopping" and done.step < 4000
    assert committed_steps(Folder(str(stopped)) / "checkpoints")[0] == 4, "the first is the best"


def test_a_rank_that_the_kernel_kills_for_memory_is_told_from_any_other_kill(
    job: Job, train: Callable[..., Path], undisturbed: dict[int, float], cgroup: Any
) -> None:
    fault = {"kind": "oom", "rank": 1, "step": 5, "cgroup": str(cgroup(200 << 20))}
    run = train(job, "out-of-memory", fault)
    (restart,) = events_of(run, "restart")
    assert "rank 1" in restart.cause
    assert "was killed by the kernel for memory" in restart.cause
    assert losses(run) == undisturbed


def test_a_rank_that_always_fails_ends_the_run_with_its_own_words(job: Job, train: Callable[..., Path]) -> None:
    with pytest.raises(TrainingError, match=r"2 times in a row.*rank 1.*not on speaking terms") as caught:
        train(
            with_(job, scale={"max_failures": 1}), "hopeless", {"kind": "raise", "rank": 1, "step": 1, "always": True}
        )
    assert caught.value.exit_code == 5


HANGS = {
    "sleep_loader": (0, "phase data"),
    "endless_forward": (1, "the others wait for it in a collective"),
    "skip": (0, "it waits in another collective than the others"),
    "stop": (1, "its process is stopped"),
}
"""Rank, and what is said of it. The loader is the first: it works ahead, and would sleep before another hang's turn.
The stopped rank is the last: it is woken to tell its stack, and could come to another fault before it is killed."""


def test_a_rank_that_hangs_is_named_with_its_line_and_the_run_goes_on(
    job: Job, train: Callable[..., Path], undisturbed: dict[int, float]
) -> None:
    hanging = with_(job, scale={"hang_after_s": 6.0, "max_failures": len(HANGS)}, checkpoint={"every_steps": 2})
    faults = [
        {"kind": kind, "rank": rank, "step": 3 + 2 * turn} for turn, (kind, (rank, _)) in enumerate(HANGS.items())
    ]
    run = train(hanging, "hanging", *faults)
    hangs = events_of(run, "hang")
    for hang, (rank, said) in zip(hangs, HANGS.values(), strict=True):
        assert hang.rank == rank
        assert said in hang.report
        assert ".py:" in hang.line
    assert losses(run) == undisturbed


def test_a_loss_that_is_not_finite_rolls_back_and_leaves_that_step_out_and_a_slow_rank_is_no_hang_but_a_straggler(
    job: Job, train: Callable[..., Path], undisturbed: dict[int, float]
) -> None:
    slow = {"kind": "slow", "rank": 1, "step": 0, "seconds": 0.2, "always": True}
    run = train(with_(job, train={"steps": 20}), "diverging", {"kind": "nan", "rank": 1, "step": 6}, slow)
    found = losses(run)
    assert set(found) == set(range(1, 21)) - {7}
    assert {step: loss for step, loss in found.items() if step < 7} == {
        step: loss for step, loss in undisturbed.items() if step < 7
    }
    (rolled_back,) = events_of(run, "rolled_back")
    assert (rolled_back.step, rolled_back.reason) == (7, "the loss is nan")
    (skipped,) = json.loads((run / "skipped.json").read_text())["steps"]
    assert skipped["step"] == 6
    assert len(skipped["sequences"]) == 8
    assert len({tuple(row) for row in skipped["rows"]}) == 8
    assert not events_of(run, "restart")
    assert not events_of(run, "hang")
    lagging = events_of(run, "straggler")
    assert lagging
    assert {event.rank for event in lagging} == {1}
    assert lagging[-1].lag_s > 0.1  # half of what it sleeps; a busy machine only adds to it


def test_a_run_that_diverges_again_and_again_ends_with_the_rows_to_look_at(
    job: Job, train: Callable[..., Path]
) -> None:
    with pytest.raises(TuneyardError, match=r"diverged 4 times.*train.learning_rate.*row") as caught:
        train(job, "lost", {"kind": "nan", "rank": 0, "step": 5, "always": True})
    assert caught.value.exit_code == 5


def test_sigterm_to_one_rank_is_agreed_by_all_and_goes_on_bit_for_bit(
    job: Job, train: Callable[..., Path], undisturbed: dict[int, float]
) -> None:
    """Told at different moments, one rank or the other, at last one whose peer waits for data: committed, exit 75, and
    the same losses in the end."""
    run = Path(job.storage) / "runs" / "preempted"

    def stop_after(step: int, rank: int, delay_s: float, *faults: dict[str, Any]) -> int:
        """Tell one rank once that step was made. Returns the last step."""
        sent = threading.Event()

        def tell() -> None:
            os.kill(rank_processes()[f"rank-{rank}"], signal.SIGTERM)
            (run / f"told-{step}").touch()

        def send(event: Event) -> None:
            if isinstance(event, StepEvent) and event.step >= step and not sent.is_set():
                sent.set()
                threading.Timer(delay_s, tell).start()

        with pytest.raises(Preempted) as caught:
            train(job, "preempted", *faults, on_event=send)
        assert caught.value.exit_code == 75
        stopped = max(losses(run))
        assert stopped in committed_steps(Folder(str(run)) / "checkpoints")
        return stopped

    def until_told(step: int) -> dict[str, Any]:
        """Rank 0 stays in the step after that one until a rank was told."""
        return {"kind": "wait", "rank": 0, "step": step, "file": str(run / f"told-{step}")}

    stopped = stop_after(1, 0, 0.0, until_told(1))
    stopped = stop_after(stopped + 1, 1, 0.0, until_told(stopped + 1))
    waits_at = stopped + 2
    assert stop_after(waits_at, 1, 1.0, {"kind": "sleep_loader", "rank": 0, "step": waits_at}) == waits_at < STEPS
    assert losses(train(job, "preempted")) == undisturbed


def test_a_rank_that_cannot_commit_within_the_grace_time_ends(job: Job, train: Callable[..., Path]) -> None:
    def send(event: Event) -> None:
        if isinstance(event, StepEvent) and event.step == 5:
            time.sleep(0.5)
            os.kill(rank_processes()["rank-0"], signal.SIGTERM)

    endless = {"kind": "endless_forward", "rank": 1, "step": 5}
    with pytest.raises(Preempted, match=r"checkpoint\.grace_s"):
        train(with_(job, checkpoint={"grace_s": 2.0}), "too-late", endless, on_event=send)
