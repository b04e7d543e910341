"""The profile of a few steps, on a real rank: which steps, what it tells, the trace, and that it changes nothing."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from orchestrator.report.tables import profile_table
from tests.ranks import run_ranks
from tests.tiny import film_rows, make_bert, shard_locally, tiny_job
from tests.trainers.training.test_training import Recorder, with_
from trainers.job.schema import Job
from trainers.model.world import World
from trainers.run.describe import describe
from trainers.run.events import Event, ProfileEvent
from trainers.storage import Folder
from trainers.training.profiling import Profiled

pytestmark = pytest.mark.slow


def events_of(jobs: list[tuple[Job, str]]) -> list[list[Event]]:
    """What rank 0 tells of each run."""
    from trainers.run.record import find_run
    from trainers.worker.rank import run_rank

    told = []
    for job, name in jobs:
        hooks = Recorder()
        run_rank(find_run(job).model_copy(update={"folder": Folder(job.storage) / "runs" / name}), hooks)
        told.append(hooks.events)
    return told


def test_three_steps_are_looked_at_and_train_as_ever(tmp_path: Path, tiny_tokenizer: Path) -> None:
    plainly = {"train": {"deepspeed": "zero0"}}
    job = tiny_job(tmp_path, make_bert(tmp_path / "model", tiny_tokenizer), "classify", film_rows(60), **plainly)
    shard_locally(job)
    looked = with_(job, train={"profile": True})
    short = with_(looked, train={"steps": 2})
    assert looked.identity() == job.identity()
    plain, profiled, brief = run_ranks(events_of, 1, [(job, "plain"), (looked, "profiled"), (short, "short")])[0]
    losses = [[event.loss for event in events if event.kind == "step"] for events in (plain, profiled)]
    assert losses[0] == losses[1]
    assert not [event for event in plain if event.kind == "profile"]
    for events, last, count in ((profiled, 6, 3), (brief, 2, 2)):
        (found,) = [event for event in events if isinstance(event, ProfileEvent)]
        assert found.step == last
        assert Path(found.trace).name == f"steps-{last - count + 1}-{last}.json.gz"
        assert len(found.operators) == 12 and all(calls > 0 for _, _, calls in found.operators)
        assert 0 < sum(seconds for _, seconds, _ in found.operators) <= found.step_s * 1.05
        assert found.tokens_per_s > 0
        said = describe(found)
        assert said is not None and said.startswith("profile: a step takes")
        trace = json.loads(gzip.decompress(Path(found.trace).read_bytes()))
        assert any("addmm" in str(each.get("name")) for each in trace["traceEvents"])
    table = profile_table(profiled)
    assert table is not None and len(table.rows) == 13
    assert profile_table(plain) is None


def test_spans_around_kernels_are_not_counted_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card the profiler also tells how long a named part of the program took there."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some Card")
    times = {"self_device_time_total": 3e5, "self_cpu_time_total": 0.0, "count": 3}
    kernel, span = (
        SimpleNamespace(key=key, device_type=SimpleNamespace(name="CUDA"), is_user_annotation=spans, **times)
        for key, spans in (("gemm", False), ("Optimizer.step#AdamW.step", True))
    )
    engine = torch.nn.Linear(2, 2)
    looked = Profiled(Recorder(), tmp_path, engine, World(0, 1, torch.device("cuda")), 0, 6)
    found = looked._summary([kernel, span], 0.6, 10.0, tmp_path / "trace")
    assert found.busy_s == pytest.approx(0.1) and found.step_s == pytest.approx(0.2)
