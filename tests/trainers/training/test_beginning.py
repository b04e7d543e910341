"""A run begins at step 0 where it never had a checkpoint, or is told to; lost checkpoints are not passed over."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tests.trainers.training.test_continuing import STEPS, make_kept
from tests.trainers.training.test_training import with_
from trainers.checkpoint.cleaning import quarantine
from trainers.errors import TrainingError
from trainers.run.events import CheckpointEvent, StartEvent
from trainers.run.folder import CLEANED, Evaluation, read_evaluations, write_evaluation
from trainers.run.record import Run
from trainers.storage import Folder
from trainers.training.beginning import begin_run, check_begun


@pytest.fixture
def kept(tmp_path: Path, tiny_tokenizer: Path) -> Run:
    """A run with a committed and evaluated step 3."""
    run = make_kept(tmp_path, tiny_tokenizer)
    events = (StartEvent(step=0, steps=STEPS), CheckpointEvent(step=3))
    run.folder.write_bytes("events.jsonl", "".join(f"{event.model_dump_json()}\n" for event in events).encode())
    for step in (0, 3):
        write_evaluation(run.folder, Evaluation(step=step, status="done", eval_key=run.shards.eval.key))
    (run.folder / "export/step-00000003").write_bytes("model.safetensors", b"weights")
    return run


def changed(run: Run, **checkpoint: Any) -> Run:
    return run.model_copy(update={"job": with_(run.job, checkpoint=checkpoint)})


def steps(run: Run) -> list[int]:
    return [record.step for record in read_evaluations(run.folder)]


def refused(run: Run) -> str:
    said = []
    for look in (begin_run, check_begun):
        with pytest.raises(TrainingError, match=r"the last of step 3 at 20.*checkpoint\.start_over=true") as caught:
            look(run)
        said.append(str(caught.value))
    assert steps(run) == [0, 3] and said[0] == said[1]
    return said[0]


def test_with_its_newest_checkpoint_a_run_goes_on(kept: Run) -> None:
    kept.folder.write_bytes(
        "events.jsonl", b"".join(CheckpointEvent(step=step).model_dump_json().encode() + b"\n" for step in (1, 2, 3))
    )
    assert begin_run(kept) is None and steps(kept) == [0, 3], "the older ones are cleaned away"
    check_begun(kept)


def test_a_run_that_never_committed_begins(kept: Run) -> None:
    shutil.rmtree(kept.checkpoints.path)
    for name in ("evals", "export"):
        (kept.folder / name).delete()
    kept.folder.write_bytes("events.jsonl", StartEvent(step=0, steps=STEPS).model_dump_json().encode())
    assert begin_run(kept) is None
    check_begun(kept)


def test_a_run_whose_checkpoints_are_gone_is_refused_until_it_may_start_over(kept: Run) -> None:
    shutil.rmtree(kept.checkpoints.path)
    assert "were deleted or moved" in refused(kept)
    said = begin_run(changed(kept, start_over=True))
    assert said is not None and "begins anew at step 0" in said and f"{kept.folder}/before-1" in said
    assert steps(kept) == [] and not (kept.folder / "export").list()
    assert (kept.folder / "before-1/evals").list() and (kept.folder / "before-1/export/step-00000003").list()
    assert begin_run(kept) is None, "the commits of before are forgotten, also without the word"
    with (kept.folder.path / "events.jsonl").open("a") as log:
        log.write(CheckpointEvent(step=3, time=time.time() + 1).model_dump_json() + "\n")
    with pytest.raises(TrainingError, match="1 were committed"):
        begin_run(kept)


def test_another_place_for_checkpoints_is_told_with_the_steps_of_before(kept: Run, tmp_path: Path) -> None:
    assert f"{kept.checkpoints} holds steps 3" in refused(changed(kept, storage=str(tmp_path / "elsewhere")))


def test_a_run_that_a_sweep_cleaned_begins_anew(kept: Run) -> None:
    shutil.rmtree(kept.checkpoints.path)
    kept.folder.write_json(CLEANED, {"schema_version": 1, "time": time.time()})
    check_begun(kept)
    assert begin_run(kept) is not None and steps(kept) == [], "what its cleaning did not come to is set aside"


def test_a_sweep_trains_what_an_earlier_one_cleaned_away(kept: Run) -> None:
    shutil.rmtree(kept.checkpoints.path)
    assert begin_run(kept, anew=True) is not None and steps(kept) == []
    check_begun(kept)


def test_damaged_checkpoints_are_told_by_who_chooses_one(kept: Run) -> None:
    quarantine(kept.checkpoints, 3, "a flipped bit")
    assert begin_run(kept) is None and steps(kept) == [0, 3]
    assert begin_run(changed(kept, start_over=True)) is not None and steps(kept) == []


def test_a_start_at_step_0_forgets_evaluations_of_before(kept: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks set the last checkpoint aside, and may start over."""
    from orchestrator.evaluation import pool

    monkeypatch.setattr(pool, "evaluation_task", lambda run, gpus: None)
    known = pool.EvaluationPool(kept, 0)
    known.note(StartEvent(step=3))
    assert [record.step for record in known.records] == [0, 3]
    known.note(StartEvent(step=0))
    assert known.records == [] and steps(kept) == []
    assert Folder(f"{kept.folder}/before-1/evals").list()


def test_a_version_in_the_registry_keeps_its_files(kept: Run) -> None:
    """An export that was left by a training before is set aside, but not from under a version that names it."""
    shutil.rmtree(kept.checkpoints.path)
    anew, export = changed(kept, start_over=True), kept.folder / "export/step-00000003"
    with pytest.raises(TrainingError, match=r"is a version in the registry.*give the job another name"):
        begin_run(anew, is_registered=lambda folder: str(folder) == str(export))
    assert export.exists("model.safetensors") and steps(kept) == [0, 3]
    assert "begins anew" in str(begin_run(anew))
    assert not export.exists("model.safetensors")
