"""`auto`: the cheapest way whose memory fits, and the largest micro-batch beside it. Devices are numbers here."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.trainers.job.test_job import changed
from trainers.job.load import parse_job
from trainers.job.schema import Job
from trainers.model.choice import WAYS, choose, settle
from trainers.model.deepspeed_config import own_settings, read_template, way_of
from trainers.model.memory import (
    DISK_GROUPS,
    DISK_SUB_GROUP_ELEMENTS,
    DISK_WEIGHTS,
    GIB,
    ModelSize,
    StepShape,
    needs,
)

BUCKET = {"largest_layer": 500_000_000}
"""As large as buckets get."""
BILLION = ModelSize(1_240_000_000, 1_240_000_000, 2, int(6.6 * GIB), layers=16, length=2048, width=2048, **BUCKET)
"""A Llama of 1.24 billion parameters in bf16 at 2,048 tokens."""
EIGHT = ModelSize(8_000_000_000, 8_000_000_000, 2, 9 * GIB, layers=32, length=2048, width=4096, **BUCKET)


def job_of(**train: Any) -> Job:
    train = {"global_batch_size": 16, "activation_checkpointing": "none", **train}
    return parse_job(changed(train=train, data={"max_length": 2048}))


def choice_of(size: ModelSize, workers: int, gib: float | None, **train: Any) -> tuple[str, int]:
    found = choose(job_of(**train), workers, None if gib is None else int(gib * GIB), lambda: size)
    return found.way, found.step.micro_batch_size


def test_each_way_needs_less_of_the_device_than_the_one_before() -> None:
    for size in (BILLION, EIGHT):
        states = [need.state for need in needs(size, 8, StepShape(1))]
        assert states == sorted(states, reverse=True)
        assert needs(size, 8, StepShape(1))[-1].host > 0


@pytest.mark.parametrize(
    ("size", "workers", "gib", "way"),
    [
        (BILLION, 1, 80, "zero0"),
        (BILLION, 8, 80, "zero0"),
        (BILLION, 8, 24, "zero1"),
        (BILLION, 8, 23, "zero1"),
        (BILLION, 8, 22, "zero1"),
        (EIGHT, 8, 80, "zero1"),
        (EIGHT, 8, 60, "zero1"),
        (EIGHT, 8, 42, "zero3"),
        (EIGHT, 1, 80, "zero3-cpu-offload"),
    ],
)
def test_the_cheapest_way_that_fits_is_taken(size: ModelSize, workers: int, gib: float, way: str) -> None:
    assert choice_of(size, workers, gib)[0] == way


def test_a_disk_is_taken_where_it_is_named() -> None:
    eight = replace(EIGHT, tensors=(2_000_000_000,))
    job = job_of(deepspeed="zero3-nvme-offload", offload_folder="/local")
    found = choose(job, 2, 80 * GIB, lambda: eight)
    need = next(need for need in found.needs if need.way == found.way)
    assert found.way == "zero3-nvme-offload" and found.fits
    assert need.disk == 18 * eight.parameters // 2
    group = weight = 1_000_000_000  # one tensor, in two parts
    buffers = 4 * 4 * group + 2 * 2 * group + 8 * 2 * (weight + 4096)
    gradients, first_moments = 4 * eight.parameters // 2, 8 * group  # of several micro-batches in fp32
    assert need.host == buffers + gradients + first_moments
    assert need.staging == 0 and need.state == 0
    assert choice_of(EIGHT, 1, 30, deepspeed="auto")[0] == "zero3-cpu-offload"  # never by itself


def test_the_largest_micro_batch_that_fits_is_taken() -> None:
    by_memory = {gib: choice_of(BILLION, 1, gib) for gib in (36, 45, 60, 100, 144)}
    assert by_memory == {36: ("zero0", 1), 45: ("zero0", 2), 60: ("zero0", 4), 100: ("zero0", 8), 144: ("zero0", 16)}
    assert needs(BILLION, 1, StepShape(4, 4))[0].device <= 60 * GIB < needs(BILLION, 1, StepShape(8, 2))[0].device


def test_what_the_job_names_is_kept() -> None:
    assert choice_of(BILLION, 1, 80, deepspeed="zero3", micro_batch_size=4) == ("zero3", 4)
    assert choice_of(BILLION, 1, 80, micro_batch_size=1) == ("zero0", 1)
    assert choice_of(BILLION, 1, 80, deepspeed="/my/own.json") == ("/my/own.json", 2)


@pytest.mark.parametrize(
    ("gib", "way", "step"),
    [
        (80, "zero1", StepShape(2, 8)),
        (48, "zero2", StepShape(2, 8, 2)),
        (42, "zero2", StepShape(4, 4, 1)),
        (36, "zero3", StepShape(2, 8, 2)),
        (26, "zero3", StepShape(16, 1, 1, True)),
        (10, "zero3-cpu-offload", StepShape(4, 4, 1)),
    ],
)
def test_layers_are_computed_again_where_that_is_cheaper_than_the_next_way(
    gib: float, way: str, step: StepShape
) -> None:
    found = choose(job_of(activation_checkpointing="auto", global_batch_size=128), 8, int(gib * GIB), lambda: EIGHT)
    assert (found.way, found.step) == (way, step)


LONG = replace(EIGHT, length=200_000, sequence_bytes=300 * GIB, passing_bytes=40 * GIB, tiled_layer_bytes=4 * GIB,
               tiled_passing_bytes=20 * GIB, tile_bytes=GIB)  # fmt: skip
"""Of whose sequence a layer that is computed again holds 9 + 40 GiB, in tiles 4 + 20."""


@pytest.mark.parametrize(
    ("asked", "size", "gib", "tiled", "fits"),
    [
        ("auto", LONG, 200, False, True),
        ("auto", LONG, 45, True, True),
        ("auto", replace(LONG, tiled_layer_bytes=0), 45, False, False),
        (False, LONG, 45, False, False),
        (True, LONG, 80, True, True),
    ],
)
def test_feed_forward_layers_come_in_tiles_where_that_is_the_cheapest_that_fits(
    asked: bool | str, size: ModelSize, gib: int, tiled: bool, fits: bool
) -> None:
    train = {"activation_checkpointing": "auto", "global_batch_size": 8, "feed_forward_tiles": asked}
    job = job_of(**train)
    found = choose(job, 8, gib * GIB, lambda: size)
    assert (found.step.tiled, found.fits) == (tiled, fits)
    assert settle(job, found).train.feed_forward_tiles is tiled and settle(job, found).identity() == job.identity()


def test_what_a_tile_takes_does_not_grow_with_the_sequence() -> None:
    whole, tiled = StepShape(1, checkpoint_every=1), StepShape(1, checkpoint_every=1, tiled=True)
    assert LONG.again_bytes(whole) == LONG.layer_bytes + 40 * GIB
    assert LONG.again_bytes(tiled) == (4 + 20 + 1) * GIB
    assert LONG.shared(2).again_bytes(tiled) == (2 + 10 + 1) * GIB
    none_again = StepShape(1, tiled=True)
    assert LONG.kept_bytes(none_again) == LONG.layers * 4 * GIB


def test_a_model_that_cannot_compute_layers_again_is_never_asked_to() -> None:
    plain = replace(EIGHT, checkpoints=False)
    found = choose(job_of(activation_checkpointing="auto", global_batch_size=128), 8, 42 * GIB, lambda: plain)
    assert (found.way, found.step) == ("zero3", StepShape(1, 16))


def test_without_devices_auto_means_zero3_and_no_model_is_looked_at() -> None:
    def measured() -> ModelSize:
        raise AssertionError("nothing depends on it")

    found = choose(job_of(), 2, None, measured)
    assert (found.way, found.step, found.fits, found.needs) == ("zero3", StepShape(2, 4), None, ())


def test_nothing_that_fits_is_said_with_both_figures() -> None:
    found = choose(job_of(), 1, 4 * GIB, lambda: EIGHT)
    assert found.way == list(WAYS)[-1] and found.step.micro_batch_size == 1 and found.fits is False
    assert "may not fit" in found.reason and "4.0" in found.reason


def test_the_choice_is_no_part_of_what_is_trained() -> None:
    job = job_of()
    settled = settle(job, choose(job, 1, 80 * GIB, lambda: BILLION))
    assert (settled.train.deepspeed, settled.train.micro_batch_size) == ("zero0", 4)
    assert settled.train.activation_checkpointing == "none"
    assert settled.identity() == job.identity()


def test_a_template_of_stage_0_knows_no_other_setting(tmp_path: Path) -> None:
    from trainers.errors import JobError
    from trainers.model.deepspeed_config import read_template

    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 0, "overlap_comm": true}}')
    with pytest.raises(JobError, match="trains without DeepSpeed"):
        read_template(str(tmp_path / "mine.json"))


def test_a_deepspeed_file_of_the_jobs_own_is_planned_for_ranks_on_cpus_by_what_it_says(tmp_path: Path) -> None:
    file, named = tmp_path / "mine.json", "zero3-nvme-offload"
    template = read_template(named)
    template["zero_optimization"] |= {"sub_group_size": 1_000_000, "stage3_max_live_parameters": 5}
    file.write_text(json.dumps(template))
    eight = replace(EIGHT, tensors=(1_000_000,) * 8000)
    held = []
    for deepspeed in (named, str(file)):
        job = job_of(deepspeed=deepspeed, offload_folder="/local")
        job = job.model_copy(update={"scale": job.scale.model_copy(update={"gpus_per_worker": 0})})
        said = replace(eight, own=own_settings(deepspeed))
        found = choose(job, 2, 80 * GIB, lambda said=said: said)  # type: ignore[misc]
        need = next(need for need in found.needs if need.way == found.way)
        assert found.way == deepspeed and found.fits
        held.append(need.host + need.working)
    assert said.own["sub_group_size"] == 1_000_000 and said.own["offload_param.buffer_count"] == 8
    fewer = 100_000_000 - 1_000_000  # in a group, of which there are four in fp32, and one of whole weights
    assert held[0] - held[1] == fewer * (4 * 4 + 2 * 2)
    assert [way_of(name) for name in (str(file), named, "zero2")] == [named, named, "zero2"]
    del template["zero_optimization"]["offload_param"]
    file.write_text(json.dumps(template))
    assert way_of(str(file)) is None


def test_the_plan_knows_the_groups_and_buffers_of_the_template() -> None:
    zero = read_template("zero3-nvme-offload")["zero_optimization"]
    said = (zero["sub_group_size"], zero["offload_optimizer"]["buffer_count"], zero["offload_param"]["buffer_count"])
    assert said == (DISK_SUB_GROUP_ELEMENTS, DISK_GROUPS, DISK_WEIGHTS)


@pytest.mark.parametrize(("way", "rounds"), [("zero0", 4), ("zero1", 1), ("zero2", 1), ("zero3", 1)])
def test_rows_of_many_lengths_may_take_more_micro_batches_where_that_takes_no_memory(way: str, rounds: int) -> None:
    """Half of the activations is more than the sums; under DeepSpeed those of bf16 would be there in any case."""
    found = choose(job_of(deepspeed=way, micro_batch_size=16), 1, 144 * GIB, lambda: BILLION)
    assert (found.batches.rounds, found.batches.accumulation) == (rounds, 1)


def test_where_the_sums_take_more_than_half_of_the_activations_it_stays_with_one() -> None:
    light = replace(BILLION, sequence_bytes=2**20)
    one, several = (needs(light, 1, step)[0].device for step in (StepShape(16), StepShape(8, 2)))
    assert several > one
    assert choose(job_of(deepspeed="zero0", micro_batch_size=16), 1, several, lambda: light).batches.rounds == 1


def test_on_cpus_stage_3_has_room_for_the_sum_of_fp32_gradients() -> None:
    for way, dtype, rounds in (("zero3", "float32", 4), ("zero3", "bfloat16", 1), ("zero2", "float32", 1)):
        job = job_of(deepspeed=way, micro_batch_size=16)
        job = job.model_copy(update={"model": job.model.model_copy(update={"dtype": dtype})})
        assert choose(job, 1, None, lambda: BILLION).batches.rounds == rounds
