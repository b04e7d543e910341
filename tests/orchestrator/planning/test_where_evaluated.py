"""The plan says where checkpoints are evaluated while the training runs, and why."""

import pytest

from orchestrator.planning.notes import where_evaluated
from orchestrator.ray_session import usable_cpus
from tests.orchestrator.training.test_placement import job_of
from trainers.job.schema import EarlyStopping, EvaluateSection


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_on_this_machine_it_is_known() -> None:
    full = job_of(usable_cpus())
    full = full.model_copy(update={"scale": full.scale.model_copy(update={"gpus_per_worker": 0})})
    assert where_evaluated(full, 10**6, None, elsewhere=False).startswith("the ranks evaluate between two steps: ")
    evaluate = EvaluateSection(on="free", early_stopping=EarlyStopping(patience=1))
    refused = where_evaluated(full.model_copy(update={"evaluate": evaluate}), 10**6, None, elsewhere=False)
    assert refused.endswith("; evaluate.early_stopping is refused there")


def test_sequences_that_workers_share_are_evaluated_by_them() -> None:
    job = job_of(8)
    shared = job.model_copy(update={"train": job.train.model_copy(update={"sequence_parallel": 4})})
    said = where_evaluated(shared, 10**6, 80 * 2**30, elsewhere=True)
    assert said.startswith("the ranks evaluate between two steps: 4 workers share each sequence")
    free = shared.model_copy(update={"evaluate": EvaluateSection(on="free")})
    assert where_evaluated(free, 10**6, 80 * 2**30, elsewhere=True).startswith("evaluations run beside the training")


def test_for_other_machines_what_does_not_depend_on_them_is_said() -> None:
    job = job_of(8)
    job = job.model_copy(update={"model": job.model.model_copy(update={"dtype": "bfloat16"})})
    small, large = (where_evaluated(job, count, 80 * 2**30, elsewhere=True) for count in (10**9, 70 * 10**9))
    assert small == "beside the training where a device is free, else by the ranks between two steps"
    assert "the whole model needs 142.3 GiB of a device, and one has 80.0" in large
