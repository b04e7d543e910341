"""How many trials train beside each other, and what two do that ask for the same room."""

import operator
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.evaluation.task import _with_resources
from orchestrator.sharding.ray_tasks import map_tasks
from orchestrator.sweep.tuner import trials_at_once
from orchestrator.training.worker_group import WorkerGroup
from tests.orchestrator.training.test_placement import job_of

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


@pytest.mark.parametrize(("workers", "trials"), [(1, 2), (2, 1), (3, 1)])
def test_as_many_trials_as_the_cluster_holds_with_all_their_workers(
    workers: int, trials: int, ray_session: None
) -> None:
    assert trials_at_once(job_of(workers), 0) == trials


def test_an_elastic_trial_counts_with_its_largest_size(ray_session: None) -> None:
    assert trials_at_once(job_of({"min": 1, "max": 2}), 0) == 1


def test_two_trials_of_two_workers_on_two_cores_take_turns(ray_session: None) -> None:
    """Both are started at once, as those of two sweeps may be: neither holds one core and waits for the other."""

    def hold(group: WorkerGroup) -> tuple[float, float]:
        try:
            group.gather(400)
            assert group.size == 2
            began = time.monotonic()
            time.sleep(2)
            return began, time.monotonic()
        finally:
            group.close()

    with ThreadPoolExecutor(2) as threads:
        first, second = sorted(threads.map(hold, [WorkerGroup(job_of(2), 0) for _ in range(2)]))
    assert first[1] <= second[0]


def test_what_a_trial_asks_of_ray_is_placed_outside_the_trial_s_own_room(ray_session: None) -> None:
    """Tune gives a trial a room without cores, and what a task starts is placed in its own room by default."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    run: Any = SimpleNamespace(job=job_of(1))

    def trial() -> tuple[int, list[tuple[int, int]]]:
        evaluated = ray.get(_with_resources(run, 0, abs).remote(-3))
        return evaluated, sorted(map_tasks(operator.add, 1, [0, 1]))

    room = placement_group([{"memory": 1.0}])
    inside = PlacementGroupSchedulingStrategy(room, placement_group_capture_child_tasks=True)
    try:
        task = ray.remote(num_cpus=0, memory=1, max_retries=0, scheduling_strategy=inside)(trial)
        assert ray.get(task.remote(), timeout=400) == (3, [(0, 1), (1, 2)])
    finally:
        remove_placement_group(room)
