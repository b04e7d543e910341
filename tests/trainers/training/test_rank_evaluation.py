"""Two ranks evaluate the state that they hold: the numbers are those of an evaluation beside the training."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.evaluation.task import evaluate_step
from tests.ranks import run_ranks
from tests.tiny import make_llama, shard_locally, tiny_job, write_rows
from tests.trainers.tasks import small
from tests.trainers.training.test_training import Recorder, with_
from trainers.job.schema import Job
from trainers.job.sections import GenerateSection, LoraSection
from trainers.records import Phase, StopReason
from trainers.run.events import DoneEvent, EvaluationEvent, StartEvent
from trainers.run.folder import read_evaluations
from trainers.run.record import Run, find_run
from trainers.run.row_scores import read_row_scores
from trainers.storage import Folder

pytestmark = pytest.mark.slow
EVALUATE = {"on": "ranks", "batch_size": 4}
ROWS = 85
"""A fifth of them, 17, makes five batches of four at most: the ranks' shares differ."""


def run_of(job: Job, name: str) -> Run:
    return find_run(job).model_copy(update={"folder": Folder(job.storage) / "runs" / name})


class Leaves(Recorder):
    """Is asked to leave, or ends without a word, at the second batch of the evaluation of step 3."""

    ends = False
    batches = 0

    def at(self, phase: Phase, step: int) -> None:
        self.batches += phase == "evaluate" and step == 3
        if self.ends and self.batches == 2:
            raise KeyboardInterrupt

    def stop_reason(self) -> StopReason | None:
        return "preempted" if self.batches == 2 else None


class Ends(Leaves):
    ends = True


def train_all(jobs: dict[str, Job]) -> list[tuple[str, int]]:
    """The kind and step of what was told of the run that was disturbed."""
    from trainers.worker.rank import run_rank

    for name, job in jobs.items():
        run_rank(run_of(job, name), Recorder())
    hooks: list[Recorder] = [Leaves(), Ends(), Recorder()]
    for each in hooks:
        with suppress(KeyboardInterrupt):
            run_rank(run_of(jobs["frozen"], "disturbed"), each)
    told = [event for each in hooks for event in each.events]
    return [(event.kind, event.step) for event in told if isinstance(event, StartEvent | EvaluationEvent | DoneEvent)]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    folder = tmp_path_factory.mktemp("jobs")
    encoder = small.bert(folder / "bert", dropout=0.1)
    talker = make_llama(folder / "talker" / "model", small.chat_tokenizer(folder / "talker" / "words"))

    def job(task: str, model: Path, rows: list[dict[str, Any]], train: Any = None, **sections: Any) -> Job:
        given = {"evaluate": EVALUATE, "train": {"verify": False, **(train or {})}, **sections}
        made: Job = tiny_job(folder / task, model, task, rows, **given)
        shard_locally(made)
        return made

    own = folder / "own.py"
    own.write_text("def wrong(labels, predictions, texts):\n    return sum(map(str.__ne__, labels, predictions))\n")
    counted = EVALUATE | {"metrics": {"wrong": {"function": f"{own}:wrong", "better": "min"}}, "metric": "wrong"}
    counted |= {"guards": {"wrong@beside": 3.0, "accuracy": 0.0}}

    words = [{"text": row["source"], "label": row["source"][:3]} for row in small.echo_rows(ROWS)]
    beside = {"data": {"eval_sets": {"beside": [str(write_rows(folder / "beside.jsonl", words[:7]))]}}}
    sft = job("sft", talker, small.verdict_rows(ROWS))
    sft = with_(sft, evaluate={"generate": GenerateSection(max_new_tokens=6)})
    return {
        "frozen": with_(job("classify", encoder, words), model={"freeze": ("bert.embeddings.*",)}),
        "sets": job("classify", encoder, words, evaluate=counted, **beside),
        "sft": sft,
        "sft zero0": with_(sft, train={"deepspeed": "zero0"}),
        "adapters bf16": with_(sft, model={"lora": LoraSection(rank=2), "dtype": "bfloat16"}),
        "T5": job("seq2seq", small.encoder_decoder(folder / "T5" / "model", "T5"), small.echo_rows(ROWS)),
        "cosine": job(
            "similarity", encoder, small.pair_rows(ROWS), {"objective": "cosine"}, data={"score_range": [0, 5]}
        ),
    }


@pytest.fixture(scope="module")
def told(jobs: dict[str, Job]) -> list[tuple[str, int]]:
    first: list[tuple[str, int]] = run_ranks(train_all, 2, jobs)[0]
    return first


@pytest.fixture(scope="module")
def trained(jobs: dict[str, Job], told: list[tuple[str, int]]) -> dict[str, Job]:
    return jobs


def test_an_evaluation_that_was_left_is_made_once_at_the_next_start(
    trained: dict[str, Job], told: list[tuple[str, int]]
) -> None:
    """Asked to leave in the middle of it, the ranks go with its checkpoint committed; killed there, they begin anew."""
    starts = [("start", 0), ("done", 3), ("start", 3), ("start", 3)]
    assert told == [*starts, ("evaluation", 3), ("evaluation", 6), ("done", 6)]
    plain, disturbed = (run_of(trained["frozen"], name) for name in ("frozen", "disturbed"))
    for one, other in zip(read_evaluations(plain.folder), read_evaluations(disturbed.folder), strict=True):
        assert one.model_copy(update={"seconds": 0.0}) == other.model_copy(update={"seconds": 0.0})


NAMES = ("frozen", "sets", "sft", "sft zero0", "adapters bf16", "T5", "cosine")


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_are_those_of_an_evaluation_beside_the_training(trained: dict[str, Job], name: str) -> None:
    run = run_of(trained[name], name)
    records = read_evaluations(run.folder)
    assert [record.step for record in records] == ([3, 6] if run.load_task().new_head else [0, 3, 6])
    for record in records:
        assert record.status == "done", record.error
        before = {held: read_row_scores(run.folder, record.step, held) for held in run.shards.held}
        again = evaluate_step(run, record.step)
        for held, numbers in before.items():
            after = read_row_scores(run.folder, record.step, held)
            assert numbers.keys() == after.keys()
            for column, values in numbers.items():
                assert np.array_equal(values, after[column]), (record.step, held, column, values, after[column])
        assert record.model_copy(update={"seconds": 0.0}) == again.model_copy(update={"seconds": 0.0})


def test_every_set_and_a_metric_of_the_jobs_own_are_measured(trained: dict[str, Job]) -> None:
    run = run_of(trained["sets"], "sets")
    for record in read_evaluations(run.folder):
        assert record.rows == 17 + 7
        for at, held, rows in (("", "", 17), ("@beside", "beside", 7)):
            numbers = read_row_scores(run.folder, record.step, held)
            wrong = int((numbers["label"] != numbers["prediction"]).sum())
            assert len(numbers["label"]) == rows and all(isinstance(text, str) for text in numbers["text"])
            assert record.metrics[f"wrong{at}"] == wrong
            assert record.metrics[f"accuracy{at}"] == pytest.approx(1 - wrong / rows)
        limits = {"wrong@beside": 3 - record.metrics["wrong@beside"], "accuracy": record.metrics["accuracy"]}
        assert record.guards == limits
