"""A job that goes on from another run is checked with all else, before a worker starts."""

from pathlib import Path

import pytest

from orchestrator.planning.preflight import check_job
from tests.trainers.training.test_continuing import STEPS, commit_step, from_step, kept
from trainers.errors import JobError
from trainers.run.record import Run, find_run
from trainers.training.continuing import begin_from_parent

__all__ = ["kept"]


def test_a_plan_says_where_it_begins_and_with_what(kept: Run) -> None:
    notes = check_job(from_step(kept, 3, train={"learning_rate": 2e-3})).notes
    assert notes == (f"begins at step 3 of {kept.folder}; from there on: train.learning_rate 0.001 -> 0.002",)


def test_its_problems_stand_beside_the_others(kept: Run) -> None:
    job = from_step(kept, 4, train={"seed": 1}, evaluate={"metric": "acuracy"})
    with pytest.raises(JobError) as caught:
        check_job(job)
    said = str(caught.value)
    assert "acuracy" in said and "train.seed: 1, but 0" in said and "4 is not committed" in said


def test_once_it_has_begun_its_parent_is_not_asked(kept: Run) -> None:
    commit_step(kept, 5)
    job = from_step(kept, 3)
    begin_from_parent(find_run(job), STEPS)
    for file in kept.folder.path.rglob("*"):
        if file.is_file():
            file.unlink()
    assert check_job(job).notes == ()
    with pytest.raises(JobError, match="holds no job"):
        check_job(from_step(kept, 5))


def test_rows_that_have_changed_since_are_refused(kept: Run) -> None:
    path = Path(kept.job.data.train_paths[0])
    path.write_text(path.read_text().replace("good", "fine", 3))
    with pytest.raises(JobError, match="they have changed since"):
        begin_from_parent(find_run_again(from_step(kept, 3)), STEPS)


def find_run_again(job):  # type: ignore[no-untyped-def]
    """The run once its rows are sharded anew."""
    from tests.tiny import shard_locally

    shard_locally(job)
    return find_run(job)
