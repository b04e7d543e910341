"""Where the workers fill the cluster, the ranks evaluate; where the job forbids that, it is said, and nothing
unevaluated is deleted."""

from pathlib import Path

import pytest

from orchestrator.evaluation.room import Place, check_room, place_evaluations, why_no_room
from tests.orchestrator.training.test_placement import job_of
from trainers.checkpoint import reading
from trainers.checkpoint.retention import KeptCheckpoints
from trainers.errors import JobError
from trainers.job.schema import EarlyStopping, Job
from trainers.run.events import CheckpointEvent, CheckpointQuarantinedEvent, StepEvent
from trainers.run.folder import step_name
from trainers.storage import Folder


def with_evaluate(job: Job, **values: object) -> Job:
    return job.model_copy(update={"evaluate": job.evaluate.model_copy(update=values)})


def test_a_free_core_or_gpu_is_room() -> None:
    assert why_no_room(job_of(2), 0, {"CPU": 3.0}) is None
    assert "2 workers take 2 of 2 CPUs" in str(why_no_room(job_of(2), 0, {"CPU": 2.0}))
    assert why_no_room(job_of(2), 1, {"CPU": 64.0, "GPU": 3.0}) is None
    assert "2 workers take 2 of 2 GPUs" in str(why_no_room(job_of(2), 1, {"CPU": 64.0, "GPU": 2.0}))
    assert why_no_room(job_of({"min": 1, "max": 4}), 0, {"CPU": 4.0}), "it may grow to all of them"
    assert why_no_room(with_evaluate(job_of(2), while_training=False), 0, {"CPU": 2.0}) is None


GIB = 2**30


def test_auto_takes_the_ranks_where_no_device_is_free_or_none_holds_the_model() -> None:
    job = job_of(2)
    assert place_evaluations(job, 0, {"CPU": 3.0}).on == "free"
    full = place_evaluations(job, 0, {"CPU": 2.0})
    assert str(full).startswith("the ranks evaluate between two steps: 2 workers take 2 of 2 CPUs")
    room = {"CPU": 64.0, "GPU": 9.0}
    assert place_evaluations(job, 1, room, 60 * GIB, 80 * GIB).on == "free"
    large = place_evaluations(job, 1, room, 140 * GIB, 80 * GIB)
    assert (large.on, large.reason) == ("ranks", "the whole model needs 152.7 GiB of a device, and one has 80.0")
    assert place_evaluations(with_evaluate(job, on="ranks"), 1, room).on == "ranks"
    after = place_evaluations(with_evaluate(job, while_training=False), 0, {"CPU": 2.0})
    assert after == Place("free", "only after it, for evaluate.while_training is off")


def test_a_place_that_the_job_names_and_that_is_not_there_is_said_and_early_stopping_refused() -> None:
    job = with_evaluate(job_of(2), on="free")
    stopping = with_evaluate(job, early_stopping=EarlyStopping(patience=1))
    assert check_room(stopping, place_evaluations(stopping, 0, {"CPU": 3.0})) is None
    full = place_evaluations(job, 0, {"CPU": 2.0})
    assert full.on == "free" and "no checkpoint can be evaluated while the training runs" in str(check_room(job, full))
    with pytest.raises(JobError, match=r"early_stopping cannot act: 2 workers take 2 of 2 CPUs.*evaluate\.on: ranks"):
        check_room(stopping, full)
    on_ranks = with_evaluate(stopping, on="auto")
    assert "the ranks evaluate" in str(check_room(on_ranks, place_evaluations(on_ranks, 0, {"CPU": 2.0})))


@pytest.fixture
def checkpoints(tmp_path: Path) -> Folder:
    for step in (1, 2, 3):
        (Folder(str(tmp_path)) / step_name(step)).write_bytes("COMMITTED", b"x")
    return Folder(str(tmp_path))


def gone(checkpoints: Folder) -> set[int]:
    return {1, 2, 3, 4} - set(reading.committed_steps(checkpoints))


def test_what_is_not_evaluated_stays_as_long_as_the_disk_has_room(
    checkpoints: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = KeptCheckpoints(checkpoints, keep=1)
    kept.prune(pinned={2}, unevaluated={1})
    assert kept.steps == {1, 2, 3}
    kept.note(CheckpointEvent(step=4, bytes=1 << 62))  # two more of these have no room
    kept.prune(pinned={2}, unevaluated={1, 3})
    assert kept.steps == {2, 4}
    assert gone(checkpoints) == {1, 3, 4}


def test_the_folder_is_listed_once_however_many_events_come(
    checkpoints: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    listings = []
    monkeypatch.setattr(Folder, "list", lambda self: listings.append(self) or [])
    kept = KeptCheckpoints(checkpoints, keep=10)
    for step in range(1, 200):
        kept.note(StepEvent(step=step, loss=1.0))
        if step % 10 == 0:
            kept.note(CheckpointEvent(step=step))
        kept.prune(pinned=())
    assert len(listings) == 1
    assert kept.steps == set(range(100, 200, 10))
    kept.note(CheckpointQuarantinedEvent(step=190, reason="x"))
    assert 190 not in kept.steps
