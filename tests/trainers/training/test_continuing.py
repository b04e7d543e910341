"""A run that goes on from another run's checkpoint: bit for bit where nothing changes, and with other values."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import xxhash
import yaml

from tests.bucket import serve_bucket
from tests.ranks import run_ranks
from tests.tiny import film_rows, make_bert, shard_locally, tiny_job
from tests.trainers.training.test_training import Recorder, with_
from trainers.errors import JobError, TrainingError
from trainers.job.schema import Job
from trainers.job.sections import ContinueSection, DistillSection, LoraSection
from trainers.run.continued import CHANGEABLE, changed_fields, read_line, refusal, told_line
from trainers.run.events import HistoryEvent, StartEvent, StepEvent, read_events
from trainers.run.folder import step_name
from trainers.run.record import Run, find_run
from trainers.storage import Folder
from trainers.training.continuing import begin_from_parent, find_parent
from trainers.training.divergence import SkippedStep, SkippedSteps, read_skipped, write_skipped

STEPS = 6


def from_step(run: Run, step: int, **sections: Any) -> Job:
    """The run's job, from one of its steps on with other values."""
    train = {"continue_from": ContinueSection(run=str(run.folder.path), step=step), **sections.pop("train", {})}
    return with_(run.job, train=train, **sections)


def train_run(job: Job, stop_after: int | None = None) -> list[Any]:
    """Train in the job's own folder, where a command would have left the job; the events of rank 0."""
    from trainers.worker.rank import run_rank

    hooks, run = Recorder(stop_after), find_run(job)
    run_rank(run, hooks)
    return hooks.events


def train_line(job: Job) -> dict[str, list[Any]]:
    """A run; one that goes on from its middle with nothing changed; one with other values that is stopped, whose
    parent is cleaned, and that goes on; one that comes from that one."""
    from trainers.model.world import join_world

    world, run = join_world(1, 0), find_run(job)
    found = {"parent": train_run(job), "same": train_run(from_step(run, 3))}
    other = from_step(run, 3, train={"learning_rate": 2e-3, "weight_decay": 0.0}, model={"dropout": 0.0})
    found["stopped"] = train_run(other, stop_after=4)
    world.barrier()
    if world.rank == 0:
        shutil.rmtree(run.checkpoints.path)
    world.barrier()
    found["other"] = train_run(other)
    found["grandchild"] = train_run(from_step(find_run(other), 5, train={"schedule": "constant"}))
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Run:
    folder = tmp_path_factory.mktemp("line")
    job: Job = tiny_job(folder, make_bert(folder / "model", tiny_tokenizer, dropout=0.1), "classify", film_rows(60),
                        train={"steps": STEPS, "verify": False, "schedule": "linear"},
                        checkpoint={"every_steps": 1})  # fmt: skip
    shard_locally(job)
    return leave_job(find_run(job))


def leave_job(run: Run) -> Run:
    run.folder.write_bytes("job.yaml", yaml.safe_dump(run.job.model_dump(mode="json")).encode())
    return run


def losses(events: list[Any]) -> dict[int, float]:
    return {event.step: event.loss for event in events if isinstance(event, StepEvent)}


def rates(events: list[Any]) -> dict[int, float]:
    return {event.step: event.learning_rate for event in events if isinstance(event, StepEvent)}


@pytest.fixture(scope="module")
def line(run: Run) -> dict[str, list[Any]]:
    other = from_step(run, 3, train={"learning_rate": 2e-3, "weight_decay": 0.0}, model={"dropout": 0.0})
    for job in (other, from_step(run, 3)):
        leave_job(find_run(job))
    found: dict[str, list[Any]] = run_ranks(train_line, 2, run.job)[0]
    return found


@pytest.mark.slow
def test_with_nothing_changed_it_goes_on_bit_for_bit_as_its_parent(line: dict[str, list[Any]]) -> None:
    parent, same = losses(line["parent"]), losses(line["same"])
    assert list(parent) == [1, 2, 3, 4, 5, 6] and list(same) == [4, 5, 6]
    assert {step: parent[step] for step in same} == same
    assert [event.tokens for event in line["parent"][-4:] if isinstance(event, StepEvent)] == [
        event.tokens for event in line["same"][-4:] if isinstance(event, StepEvent)
    ]


@pytest.mark.slow
def test_its_schedule_is_that_of_its_own_values_at_the_step_of_the_line(line: dict[str, list[Any]]) -> None:
    for step, rate in rates(line["same"]).items():
        assert rate == rates(line["parent"])[step] == pytest.approx(1e-3 * (STEPS - step + 1) / STEPS)
    other = rates(line["stopped"]) | rates(line["other"])
    assert other == pytest.approx({step: 2e-3 * (STEPS - step + 1) / STEPS for step in (4, 5, 6)})
    assert rates(line["grandchild"]) == {6: 2e-3}


@pytest.mark.slow
def test_it_needs_its_parent_no_more_once_it_has_begun(run: Run, line: dict[str, list[Any]]) -> None:
    assert not run.checkpoints.exists()
    starts = [event.step for name in ("stopped", "other") for event in line[name] if isinstance(event, StartEvent)]
    assert starts == [3, 4]
    assert losses(line["other"])[6] != losses(line["parent"])[6]


@pytest.mark.slow
def test_inherited_steps_are_told_with_what_they_were(line: dict[str, list[Any]]) -> None:
    (history,) = [event for event in line["grandchild"] if isinstance(event, HistoryEvent)]
    told = losses(list(history.events))
    expected = losses(line["parent"]) | losses(line["stopped"]) | losses(line["other"])
    assert told == {step: expected[step] for step in range(1, 6)}


@pytest.mark.slow
def test_the_line_names_every_run_with_its_values(run: Run, line: dict[str, list[Any]]) -> None:
    other = find_run(from_step(run, 3, train={"learning_rate": 2e-3, "weight_decay": 0.0}, model={"dropout": 0.0}))
    last = find_run(from_step(other, 5, train={"schedule": "constant"}))
    first, second = read_line(last.folder)
    assert (first.run, first.step, second.run, second.step) == (run.folder.name, 3, other.folder.name, 5)
    assert first.changed == {"train.learning_rate": (1e-3, 2e-3), "train.weight_decay": (0.01, 0.0),
                             "model.dropout": (None, 0.0)}  # fmt: skip
    assert second.changed == {"train.schedule": ("linear", "constant")}
    assert told_line((first, second))[1].startswith(f"steps 4-5: {other.folder.name} ({second.digest})")


@pytest.fixture
def kept(tmp_path: Path, tiny_tokenizer: Path) -> Run:
    """A run of another storage that stands at a committed step 3 of 6, made without training."""
    return make_kept(tmp_path, tiny_tokenizer)


def make_kept(folder: Path, tokenizer: Path, **sections: Any) -> Run:
    job: Job = tiny_job(folder, make_bert(folder / "model", tokenizer), "classify", film_rows(60), **sections)
    shard_locally(job)
    run = leave_job(find_run(job))
    run.folder.write_bytes("events.jsonl", (StartEvent(step=0, steps=STEPS).model_dump_json() + "\n").encode())
    commit_step(run, 3)
    return run


def commit_step(run: Run, step: int) -> Folder:
    """A checkpoint with one file beside its records, committed as one rank does."""
    from trainers.checkpoint.records import CheckpointState, FileRecord, Vote, rank_file
    from trainers.checkpoint.writing import commit

    folder = run.checkpoints / step_name(step)
    folder.write_bytes(rank_file(0, 1), b"numbers")
    state = CheckpointState(step=step, world_size=1, zero_stage=3, shapes={}, trainable=(), tokens=9,
                            train_key=run.shards.train.key, job=run.job.identity())  # fmt: skip
    record = FileRecord(bytes=7, digest=xxhash.xxh3_128_hexdigest(b"numbers"))
    commit(folder, Vote(save="a-1", file=record), 1, state)
    return folder


def test_the_first_checkpoint_is_the_parents_under_another_name(kept: Run) -> None:
    from trainers.checkpoint.damage import find_damage
    from trainers.checkpoint.local_copies import LocalCopies

    child = find_run(from_step(kept, 3))
    assert begin_from_parent(child, STEPS) is not None and begin_from_parent(child, STEPS) is None
    mine, theirs = child.checkpoints.path / step_name(3), kept.checkpoints.path / step_name(3)
    name = "rank-00000-of-00001.safetensors"
    assert (mine / name).samefile(theirs / name)
    shutil.rmtree(theirs)
    assert find_damage(LocalCopies(Folder(str(mine)))) is None
    assert (child.checkpoints / step_name(3)).read_json("state.json")["job"] == child.job.identity()


def test_steps_that_the_parent_left_out_before_stay_left_out(kept: Run) -> None:
    def skip(step: int) -> SkippedStep:
        return SkippedStep(step=step, loss="nan", reason="", sequences=(), rows=())

    write_skipped(kept.folder, SkippedSteps(steps=(skip(1), skip(3))))
    child = find_run(from_step(kept, 3))
    begin_from_parent(child, STEPS)
    assert read_skipped(child.folder).numbers == {1}


def test_a_start_that_was_killed_while_it_linked_begins_anew(kept: Run) -> None:
    child = find_run(from_step(kept, 3))
    half = child.checkpoints / step_name(3)
    half.write_bytes("rank-00000-of-00001.safetensors", b"half")
    half.write_bytes("rank-00000-of-00001.json", b"{}")
    assert begin_from_parent(child, STEPS) is not None
    assert half.read_bytes("rank-00000-of-00001.safetensors") == b"numbers"
    assert not half.exists("rank-00000-of-00001.json")


def test_a_parent_on_another_file_system_is_copied(kept: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainers.training import continuing

    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(continuing.os, "link", refuse)
    child, told = find_run(from_step(kept, 3)), list[str]()
    begin_from_parent(child, STEPS, lambda: told.append("alive"))
    assert told, "a rank that copies for long does not hang"
    assert (child.checkpoints / step_name(3)).read_bytes("rank-00000-of-00001.safetensors") == b"numbers"


def test_a_parent_in_a_bucket_is_copied(tmp_path: Path, tiny_tokenizer: Path) -> None:
    from trainers.checkpoint.damage import find_damage
    from trainers.checkpoint.local_copies import LocalCopies

    pytest.importorskip("moto")
    with serve_bucket() as bucket:
        kept = make_kept(tmp_path, tiny_tokenizer, checkpoint={"storage": bucket.uri("c")})
        child = find_run(from_step(kept, 3))
        assert begin_from_parent(child, STEPS) is not None and not child.checkpoints.is_local
        kept.checkpoints.delete()
        assert find_damage(LocalCopies(child.checkpoints / step_name(3))) is None
        assert begin_from_parent(child, STEPS) is None


def test_other_ranks_wait_for_the_copy_however_long_in_no_collective(
    kept: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainers.training import continuing
    from trainers.worker import rank

    child, others = find_run(from_step(kept, 3)), iter(range(5))

    def pause(_: float) -> None:
        if next(others) == 3:
            begin_from_parent(child, STEPS)

    monkeypatch.setattr(continuing, "time", SimpleNamespace(sleep=pause))
    second: Any = SimpleNamespace(rank=1)
    rank._begin(child, STEPS, Recorder(), second)
    assert next(others) == 4 and (child.checkpoints / step_name(3)).exists("COMMITTED")
    rank._begin(kept, STEPS, Recorder(), second)  # it names no parent
    assert next(others, None) is None


def test_a_damaged_parent_is_refused(kept: Run) -> None:
    (kept.checkpoints / step_name(3)).write_bytes("state.json", b"{}")
    with pytest.raises(TrainingError, match=r"damaged: state\.json"):
        begin_from_parent(find_run(from_step(kept, 3)), STEPS)


def test_every_problem_is_said_at_once(kept: Run) -> None:
    job = from_step(
        kept, 4, train={"seed": 1, "global_batch_size": 4, "learning_rate": 2.0}, model={"dtype": "bfloat16"}
    )
    with pytest.raises(JobError) as caught:
        find_parent(job)
    said = str(caught.value)
    for part in ("train.seed: 1, but 0 in the run", "train.global_batch_size: 4, but 8", "model.dtype: 'bfloat16'",
                 "4 is not committed", "there are: 3"):  # fmt: skip
        assert part in said
    assert "learning_rate" not in said


def test_what_is_not_there_or_was_trained_again_is_refused(kept: Run) -> None:
    asked = ContinueSection(run=str(kept.folder.path), step=3, digest="0" * 32)
    with pytest.raises(JobError, match="trained again since"):
        find_parent(with_(kept.job, train={"continue_from": asked}))
    with pytest.raises(JobError, match=r"holds no job\.yaml"):
        find_parent(with_(kept.job, train={"continue_from": ContinueSection(run="/nowhere", step=3)}))


def test_the_last_step_is_no_begin_but_of_a_longer_training(kept: Run) -> None:
    commit_step(kept, STEPS)
    with pytest.raises(JobError, match="nothing is left"):
        find_parent(from_step(kept, STEPS))
    assert find_parent(from_step(kept, STEPS, train={"steps": 9})).changed == {"train.steps": (6, 9)}


def test_other_model_files_or_rows_are_refused(kept: Run) -> None:
    child = find_run(from_step(kept, 3))
    with pytest.raises(JobError, match="they have changed since"):
        begin_from_parent(child.model_copy(update={"model": replace(child.model, digest="x")}), STEPS)


def test_what_may_change_are_fields_that_the_job_has(kept: Run) -> None:
    def has(model: Any, *names: str) -> bool:
        return not names or has(getattr(model, names[0]), *names[1:])

    job = with_(kept.job, train={"distill": DistillSection(teacher="t")}, model={"lora": LoraSection()})
    assert all(has(job, *field.split(".")) for field in CHANGEABLE)
    assert refusal("train.class_weights.good") is None and refusal("train.learning_rates") is not None
    assert changed_fields(kept.job, with_(kept.job, evaluate={"metric": "loss"}, scale={"workers": 4})) == {}
    assert kept.job.identity() != from_step(kept, 3).identity()
    assert read_events(kept.folder)
