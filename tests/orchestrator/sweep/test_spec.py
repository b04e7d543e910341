"""Sweeps that cannot be are refused before anything starts, with every problem."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.sweep.check import check_trials
from orchestrator.sweep.points import draw, first_points
from orchestrator.sweep.spec import Range, SweepSpec, read_spec
from tests.tiny import film_rows, make_bert, tiny_job
from trainers.errors import JobError


@pytest.fixture(scope="module")
def job_file(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    folder = tmp_path_factory.mktemp("spec")
    job = tiny_job(folder, make_bert(folder / "model", tiny_tokenizer), "classify", film_rows(40))
    (folder / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")), encoding="utf-8")
    return folder / "job.yaml"


def problems(job_file: Path, *grids: str, **sweep: Any) -> str:
    """What is said of grids over the job file, or of a sweep file beside it."""
    path = job_file
    if sweep:
        path = job_file.with_name("sweep.yaml")
        path.write_text(yaml.safe_dump({"job": job_file.name, **sweep}), encoding="utf-8")
    with pytest.raises(JobError) as caught:
        check_trials(read_spec(path, grids, None), ())
    assert not (job_file.parent / "storage" / "sweeps").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("grids", "said"),
    [
        (["train.learning_rat=1,2"], "train.learning_rat: unknown key; did you mean 'learning_rate'?"),
        (["train.learning_rate="], "train.learning_rate: no values"),
        (["train.learning_rate"], "not of the form section.key=value,value"),
        (["train.learning_rate=[1"], "not of the form section.key=value,value"),
        (["train.learning_rate=1e-3,0.001"], "0.001 stands twice"),
        (["train.learning_rate=1e-3", "train.learning_rate=1e-4"], "stands twice; give all its values in one"),
        (
            ["train.learning_rate=1e-3,high"],
            "with train.learning_rate=high: train.learning_rate: must be a valid number",
        ),
        (["learning_rate=1e-3"], "name a single field, as section.key"),
        (["registry.promote=always,never"], "registry is the same for all runs of a sweep"),
        (["evaluate.metric=accuracy,auroc"], "evaluate.metric is the same for all runs"),
        (["scale.workers=1,2"], "are one run: what is varied changes nothing of what is trained"),
        (["train.global_batch_size=7,8", "scale.workers=2"], "with train.global_batch_size=7, scale.workers=2: "),
        ([], "nothing to vary"),
    ],
)
def test_a_grid_that_cannot_be(job_file: Path, grids: list[str], said: str) -> None:
    assert said in problems(job_file, *grids)


RATE = {"train.learning_rate": {"low": 1e-5, "high": 1e-3}}


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ({"spaces": RATE}, ["space: required, and missing", "spaces: unknown key; did you mean 'space'?"]),
        ({"space": {}}, ["space: name at least one field"]),
        ({"space": RATE}, ["space.train.learning_rate: a grid needs a list of values"]),
        ({"space": RATE, "method": "random"}, ["trials: random needs to know how many to draw"]),
        ({"space": RATE, "method": "rnadom", "trials": 3}, ["'tpe' or 'population', got 'rnadom'"]),
        ({"space": RATE, "method": "population", "trials": 4}, ["generations: population needs to know how many"]),
        ({"space": {"train.seed": [1, 2]}, "generations": 2}, ["generations: for method: population alone"]),
        (
            {
                "space": {"train.global_batch_size": [4, 8], "train.epochs": [1, 2]},
                "method": "population",
                "trials": 1,
                "generations": 2,
                "halving": 2,
            },
            [
                "space.train.global_batch_size: cannot change within a training (it decides which rows a step has",
                "space.train.epochs: cannot change within a training (it says how long it is)",
                "trials: of one member nobody copies",
                "halving: population stops nobody",
            ],
        ),
        ({"space": {"train.seed": [1, 2]}, "pauses": 2}, ["pauses: trials pause for halving alone"]),
        ({"space": {"train.seed": [1, 2]}, "trials": 2}, ["trials: a grid has all its points"]),
        (
            {"space": {"train.learning_rate": {"low": 0.0, "high": 1.0, "log": True}, "train.seed": []}, "halving": 1},
            ["log needs a low above 0", "space.train.seed: no values", "halving: must be greater than or equal to 2"],
        ),
        (
            {"space": {"train.learning_rate": {"low": 2, "hihg": 1}}, "method": "random", "trials": 3},
            ["train.learning_rate.hihg: unknown key; did you mean 'high'?"],
        ),
    ],
)
def test_a_sweep_file_that_cannot_be(job_file: Path, sweep: dict[str, Any], said: list[str]) -> None:
    found = problems(job_file, **sweep)
    assert all(part in found for part in said), found


def test_every_bound_is_checked_where_values_are_not_known_yet(job_file: Path) -> None:
    pytest.importorskip("optuna")
    found = problems(job_file, space={"train.learning_rate": {"low": -1.0, "high": 1.0}}, method="tpe", trials=3)
    assert "with train.learning_rate=-1.0: train.learning_rate: must be greater than 0" in found


def test_every_bound_of_a_population_is_checked_for_values_that_come_later(job_file: Path) -> None:
    space = {"train.weight_decay": {"low": -0.1, "high": 0.1}, "train.learning_rate": [1e-3, 1e-4]}
    found = problems(job_file, space=space, method="population", trials=2, generations=2)
    assert "with train.learning_rate=0.001, train.weight_decay=-0.1: train.weight_decay: must be greater than" in found


def test_what_only_populations_read_is_no_part_of_other_sweeps() -> None:
    space = {"train.learning_rate": (1e-3, 1e-4)}
    grid, other = (SweepSpec(job="j", space=space, quantile=quantile) for quantile in (0.25, 0.5))
    assert grid.digest() == other.digest()
    first, second = (one.model_copy(update={"method": "population"}) for one in (grid, other))
    assert len({grid.digest(), first.digest(), second.digest()}) == 3


def test_a_sweep_file_and_a_grid_together_are_refused(job_file: Path) -> None:
    said = problems(job_file, "train.seed=1,2", space={"train.seed": [1, 2]})
    assert "leave out --set-grid and --halving" in said


def test_a_grid_has_every_combination_in_the_order_given() -> None:
    spec = SweepSpec(job="job.yaml", space={"train.seed": (1, 2), "data.overlong": ("drop", "error")})
    pairs = [tuple(point.values()) for point in first_points(spec)]
    assert pairs == [(1, "drop"), (1, "error"), (2, "drop"), (2, "error")]


def test_random_points_are_distinct_within_bounds_and_the_same_each_time() -> None:
    space = {"train.learning_rate": Range(low=1e-6, high=1e-3, log=True), "train.epochs": Range(low=1, high=3)}
    spec = SweepSpec(job="job.yaml", space=space, method="random", trials=40)
    points = first_points(spec)
    assert points == first_points(spec) != first_points(spec.model_copy(update={"seed": 1}))
    rates = [point["train.learning_rate"] for point in points]
    assert len(set(rates)) == 40 and all(1e-6 <= rate <= 1e-3 for rate in rates)
    assert sum(rate < 3.16e-5 for rate in rates) in range(10, 31), "even by magnitude"
    assert {point["train.epochs"] for point in points} == {1, 2, 3}


def test_a_small_space_gives_what_it_has() -> None:
    space = {"train.seed": (1, 2)}
    assert len(first_points(SweepSpec(job="job.yaml", space=space, method="random", trials=5))) == 2
    import random

    assert {draw((1, 2), random.Random(seed)) for seed in range(20)} == {1, 2}
