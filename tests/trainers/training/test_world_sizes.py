"""From three and from four ranks to two, in the middle of an epoch: same samples, losses, learning rates and moments.

The model ties its embeddings, its sizes divide by nothing, and in the run from four ranks a part of it is frozen and
the optimizer is offloaded.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.tiny import chat_rows, make_llama, shard_locally, tiny_job
from tests.trainers.training.test_training import Recorder, with_
from trainers.checkpoint.local_copies import LocalCopies
from trainers.checkpoint.reading import CheckpointReader
from trainers.checkpoint.slices import KINDS
from trainers.job.schema import Job
from trainers.run.folder import step_name
from trainers.storage import Folder

pytestmark = pytest.mark.slow
STEPS, STOP, PER_EPOCH = 8, 3, 4


@dataclass(frozen=True)
class Heard:
    """What one rank saw and said in one run."""

    rows: dict[int, list[int]]
    """Rows of the data that this rank trained on, by step."""
    events: list[Any]

    def by_step(self, field: str) -> dict[int, float]:
        return {event.step: getattr(event, field) for event in self.events if event.kind == "step"}


def train_with_ledger(runs: list[tuple[Job, str, int | None]]) -> list[Heard]:
    """Train one run after another, noting the rows of every micro-batch that is handed out."""
    import trainers.worker.rank
    from trainers.batching.batches import StepBatch, StepSource

    seen: dict[int, list[int]] = {}

    class Noting(StepSource):
        def next(self, step: int) -> StepBatch:
            batch = super().next(step)
            seen[step + 1] = [int(row) for micro in batch.micro_batches for row in micro.rows]
            return batch

    trainers.worker.rank.StepSource = Noting  # type: ignore[misc]
    heard = []
    for job, run, stop_after in runs:
        seen.clear()
        hooks = Recorder(stop_after)
        trainers.worker.rank.run_rank(named_run(job, run), hooks)
        heard.append(Heard(dict(seen), hooks.events))
    return heard


def named_run(job: Job, run: str) -> Any:
    from trainers.run.record import find_run

    return find_run(job).model_copy(update={"folder": Folder(job.storage) / "runs" / run})


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory, tiny_chat_tokenizer: Path) -> dict[int, Job]:
    """By the world size that they start with."""
    folder = tmp_path_factory.mktemp("worlds")
    model = make_llama(folder / "model", tiny_chat_tokenizer)
    plain: Job = tiny_job(
        folder, model, "sft", chat_rows(60), data={"max_length": 256, "packing": False},
        train={"global_batch_size": 12, "steps": STEPS}, checkpoint={"every_steps": 100},
    )  # fmt: skip
    shard_locally(plain)
    harder = with_(plain, model={"freeze": ("model.layers.0.*",)}, train={"deepspeed": "zero3-cpu-offload"})
    return {3: plain, 4: harder}


@pytest.fixture(scope="module")
def heard(jobs: dict[int, Job]) -> dict[str, list[Heard]]:
    """Each run's ranks: begun with 3 or 4, gone on with 2, and undisturbed with 2."""
    found = {f"begun {size}": [one[0] for one in run_ranks(train_with_ledger, size, [(job, f"from-{size}", STOP)])]
             for size, job in jobs.items()}  # fmt: skip
    plan = [(job, f"{kind}-{size}", None) for size, job in jobs.items() for kind in ("from", "whole")]
    names = [f"{kind} {size}" for size in jobs for kind in ("resumed", "whole")]
    ranks = run_ranks(train_with_ledger, 2, plan)
    return found | {name: [rank[number] for rank in ranks] for number, name in enumerate(names)}


def rows_by_step(ranks: list[Heard]) -> dict[int, list[int]]:
    """Rows of each step over all ranks, in the global order."""
    return {step: [row for rank in ranks for row in rank.rows[step]] for step in ranks[0].rows}


@pytest.mark.parametrize("size", [3, 4])
def test_each_sample_is_seen_exactly_once_an_epoch_across_the_change(heard: dict[str, list[Heard]], size: int) -> None:
    begun, resumed, whole = (rows_by_step(heard[f"{kind} {size}"]) for kind in ("begun", "resumed", "whole"))
    assert (list(begun), list(resumed)) == ([1, 2, 3], [4, 5, 6, 7, 8])
    ledger = begun | resumed
    assert ledger == whole
    for epoch in range(STEPS // PER_EPOCH):
        steps = range(epoch * PER_EPOCH + 1, (epoch + 1) * PER_EPOCH + 1)
        assert Counter(row for step in steps for row in ledger[step]) == Counter(range(48))


@pytest.mark.parametrize("size", [3, 4])
def test_losses_and_learning_rates_are_those_of_the_undisturbed_run(heard: dict[str, list[Heard]], size: int) -> None:
    begun, resumed, whole = (heard[f"{kind} {size}"][0] for kind in ("begun", "resumed", "whole"))
    assert begun.by_step("loss") | resumed.by_step("loss") == pytest.approx(whole.by_step("loss"), abs=1e-5)
    rates = begun.by_step("learning_rate") | resumed.by_step("learning_rate")
    assert rates == whole.by_step("learning_rate")


@pytest.mark.parametrize("size", [3, 4])
def test_weights_and_moments_end_as_in_the_undisturbed_run(
    heard: dict[str, list[Heard]], jobs: dict[int, Job], size: int
) -> None:
    runs = Folder(jobs[size].storage) / "runs"
    resumed, whole = (
        CheckpointReader(LocalCopies(runs / f"{kind}-{size}" / "checkpoints" / step_name(STEPS)))
        for kind in ("from", "whole")
    )
    assert len(resumed.state.trainable) < len(resumed.state.shapes) or size == 3
    for name, shape in resumed.state.shapes.items():
        count = 1
        for length in shape:
            count *= length
        for kind in KINDS if name in resumed.state.trainable else KINDS[:1]:
            found, expected = resumed.read(kind, name, 0, count), whole.read(kind, name, 0, count)
            assert found.sub(expected).abs().max() <= 1e-5, (kind, name)
