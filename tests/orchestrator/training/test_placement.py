"""How many ranks run, and where."""

import pytest

from orchestrator.training.placement import Slots, assign_ranks, fitting_sizes, largest_size, slots_of, with_room
from trainers.job.load import parse_job


def job_of(workers, global_batch_size=8, cpus_per_worker=1):
    return parse_job(
        {
            "name": "x",
            "task": "classify",
            "model": {"path": "m"},
            "data": {"train": ["a.jsonl"], "eval": ["b.jsonl"]},
            "train": {"global_batch_size": global_batch_size, "steps": 1, "learning_rate": 1e-3},
            "scale": {"workers": workers, "cpus_per_worker": cpus_per_worker},
        }
    )


def test_a_node_holds_what_its_scarcest_resource_allows():
    assert slots_of({"CPU": 7.0}, cpus=2, gpus=0) == 3
    assert slots_of({"CPU": 64.0, "GPU": 8.0}, cpus=4, gpus=1) == 8
    assert slots_of({"CPU": 8.0, "GPU": 8.0}, cpus=4, gpus=1) == 2
    assert slots_of({}, cpus=1, gpus=0) == 0


def test_only_sizes_that_keep_the_global_batch_count():
    assert fitting_sizes(job_of({"min": 1, "max": 8}, global_batch_size=12)) == [1, 2, 3, 4, 6]
    assert fitting_sizes(job_of(2)) == [2]


def test_the_largest_size_that_fits_is_taken():
    nodes = [Slots("a", 4), Slots("b", 1)]
    assert largest_size([1, 2, 3, 4, 6], nodes) == 4
    assert largest_size([8], nodes) is None


def test_ranks_of_a_node_stand_next_to_each_other_on_few_nodes():
    nodes = [Slots("a", 2), Slots("b", 4), Slots("c", 4)]
    assert assign_ranks(6, nodes) == {"b": [0, 1, 2, 3], "c": [4, 5]}
    assert assign_ranks(4, nodes) == {"b": [0, 1, 2, 3]}
    with pytest.raises(ValueError, match="11 ranks do not fit"):
        assign_ranks(11, nodes)


def test_what_is_free_beside_the_ranks_of_a_node_counts_if_the_group_grows_by_it():
    assert with_room([2, 4], {"a": 2, "b": 0}, {"a": 2}, 4) == [Slots("a", 4), Slots("b", 0)]
    assert with_room([2, 8], {"a": 2, "b": 0}, {"a": 2}, 8) == [Slots("a", 2), Slots("b", 0)]
    assert with_room([4], {"b": 9}, {}, 4) == [Slots("b", 4)]
