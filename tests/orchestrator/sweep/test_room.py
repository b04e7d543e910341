"""How many trials train beside each other, and what two do that ask for the same room."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from orchestrator.sweep.sweep import _at_once
from orchestrator.training.worker_group import WorkerGroup
from tests.orchestrator.training.test_placement import job_of

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


@pytest.mark.parametrize(("workers", "trials"), [(1, 2), (2, 1), (3, 1)])
def test_as_many_trials_as_the_cluster_holds_with_all_their_workers(
    workers: int, trials: int, ray_session: None
) -> None:
    assert _at_once(job_of(workers), 0) == trials


def test_an_elastic_trial_counts_with_its_largest_size(ray_session: None) -> None:
    assert _at_once(job_of({"min": 1, "max": 2}), 0) == 1


def test_two_trials_of_two_workers_on_two_cores_take_turns(ray_session: None) -> None:
    """Both are started at once, as those of two sweeps may be: neither holds one core and waits for the other."""

    def hold(group: WorkerGroup) -> tuple[float, float]:
        try:
            group.gather(120)
            assert group.size == 2
            began = time.monotonic()
            time.sleep(2)
            return began, time.monotonic()
        finally:
            group.close()

    with ThreadPoolExecutor(2) as threads:
        first, second = sorted(threads.map(hold, [WorkerGroup(job_of(2), 0) for _ in range(2)]))
    assert first[1] <= second[0]
