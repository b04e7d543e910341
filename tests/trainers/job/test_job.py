"""The job file: strict, everything reported at once, the same from any folder."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from trainers.errors import JobError
from trainers.job.load import load_job, parse_job
from trainers.job.schema import Job

GOOD: dict[str, Any] = {
    "name": "sentiment",
    "task": "classify",
    "model": {"path": "org/model"},
    "data": {"train": ["train.jsonl"], "eval": ["dev.jsonl"]},
    "train": {"global_batch_size": 32, "epochs": 3, "learning_rate": 5e-5},
}


def changed(**sections: Any) -> dict[str, Any]:
    raw = {key: dict(value) if isinstance(value, dict) else value for key, value in GOOD.items()}
    for key, value in sections.items():
        raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
    return raw


def problems_of(raw: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(JobError) as caught:
        parse_job(raw, "job.yaml")
    assert caught.value.exit_code == 2
    return caught.value.problems


def test_a_good_job_has_the_documented_defaults() -> None:
    job = parse_job(GOOD)
    assert (job.train.schedule, job.train.seed, job.checkpoint.keep, job.scale.max_failures) == ("cosine", 0, 3, 3)
    assert (job.packing, job.overlong) == (False, "truncate")


@pytest.mark.parametrize(("task", "packing", "overlong"), [("pretrain", True, "split"), ("sft", True, "truncate")])
def test_packing_and_overlong_default_by_task(task: str, packing: bool, overlong: str) -> None:
    job = parse_job(changed(task=task))
    assert (job.packing, job.overlong) == (packing, overlong)


def test_every_problem_is_reported_at_once() -> None:
    raw = changed(task="clasify", train={"global_batch_size": 0, "steps": 5, "learning_rate": "fast"}, eval={})
    raw["data"]["packin"] = True
    assert problems_of(raw) == (
        "task: must be 'pretrain', 'mlm', 'sft', 'classify', 'tag', 'extract', 'seq2seq' or 'similarity', "
        "got 'clasify'",
        "data.packin: unknown key; did you mean 'packing'?",
        "train.global_batch_size: must be greater than or equal to 1, got 0",
        "train.learning_rate: must be a valid number, got 'fast'",
        "eval: unknown key; did you mean 'evaluate'?",
        "train: give either epochs or steps, one of them",
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"scale": {"workers": 0}}, "scale.workers: must be greater than or equal to 1, got 0"),
        ({"scale": {"workers": {"min": 3, "max": 2}}}, "scale.workers: min (3) is larger than max (2)"),
        ({"scale": {"workers": {"min": 1, "mx": 2}}}, "scale.workers.mx: unknown key; did you mean 'max'?"),
        ({"scale": {"workers": True}}, "scale.workers: must be a valid integer, got True"),
        ({"data": {"eval_fraction": 0.1}}, "data: give either eval (files) or eval_fraction"),
        ({"data": {"eval_fraction": 1.5, "eval": []}}, "data.eval_fraction: must be less than 1, got 1.5"),
        ({"data": {"columns": {"txt": "review"}}}, "data.columns.txt: unknown key; did you mean 'text'?"),
        (
            {"evaluate": {"early_stopping": {"patience": 1}, "while_training": False}},
            "evaluate.early_stopping: nothing is evaluated while_training",
        ),
        ({"train": {"compile": True, "deepspeed": "zero3"}}, "train.compile: not under ZeRO-3"),
        ({"train": {"sequence_parallel": 2}}, "train.sequence_parallel: means nothing to task classify"),
        ({"train": {"sequence_parallel": 0}}, "train.sequence_parallel: must be greater than or equal to 1, got 0"),
        ({"data": {"packing": True}}, "data.packing: classify reads one row a sequence"),
        ({"data": {"overlong": "split"}}, "data.overlong: split cuts one row into several, which classify cannot use"),
        ({"model": {"dtype": "float16"}}, "model.dtype: must be 'float32' or 'bfloat16', got 'float16'"),
        ({"name": "a/b"}, "name: String should match pattern"),
    ],
)
def test_each_rule_names_the_key_the_value_and_the_remedy(change: dict[str, Any], problem: str) -> None:
    assert any(line.startswith(problem) for line in problems_of(changed(**change))), problems_of(changed(**change))


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_paths_are_taken_from_the_files_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").mkdir()
    raw = changed(model={"path": "weights"}, train={"deepspeed": "ds/mine.json"})
    path = write(tmp_path, yaml.safe_dump(raw))
    monkeypatch.chdir("/")
    job = load_job(path)
    assert job.data.train == (str(tmp_path / "train.jsonl"),)
    assert job.model.path == str(tmp_path / "weights")
    assert job.train.deepspeed == str(tmp_path / "ds/mine.json")
    assert job.storage == str(tmp_path / "runs")


def test_remote_paths_and_hub_ids_stay_as_they_are(tmp_path: Path) -> None:
    raw = changed(data={"train": ["s3://bucket/train-*.jsonl"]}, storage="gs://bucket/runs")
    job = load_job(write(tmp_path, yaml.safe_dump(raw)))
    assert (job.data.train, job.storage, job.model.path) == (
        ("s3://bucket/train-*.jsonl",),
        "gs://bucket/runs",
        "org/model",
    )


def test_exponents_without_a_point_are_numbers(tmp_path: Path) -> None:
    text = yaml.safe_dump(GOOD).replace("5.0e-05", "5e-5")
    assert "5e-5" in text
    assert load_job(write(tmp_path, text)).train.learning_rate == 5e-5


def test_keys_are_names_also_those_that_yaml_reads_as_true_and_false(tmp_path: Path) -> None:
    raw = changed(evaluate={"on": "ranks"}, train={"class_weights": {"yes": 2.0, "no": 1.0}})
    text = yaml.safe_dump(raw).replace("'on'", "on").replace("'yes'", "yes").replace("'no'", "no")
    assert " on: ranks" in text and " yes: 2.0" in text
    (tmp_path / "job.yaml").write_text(text)
    job = load_job(tmp_path / "job.yaml")
    assert job.evaluate.on == "ranks" and job.train.class_weights == {"yes": 2.0, "no": 1.0}


def test_ranks_that_evaluate_after_the_training_are_refused() -> None:
    raw = changed(evaluate={"on": "ranks", "while_training": False})
    assert problems_of(raw) == ("evaluate.on: the ranks evaluate while they train; leave out while_training: false",)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="'name' stands twice"):
        load_job(write(tmp_path, yaml.safe_dump(GOOD) + "name: other\n"))


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not valid YAML"), ("- 1", "mapping"), ("\x00", "not valid YAML")]
)
def test_what_is_no_job_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        load_job(write(tmp_path, text))


def test_a_missing_job_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="tuneyard init quickstart"):
        load_job(tmp_path / "none.yaml")


def test_overrides_are_typed_and_checked(tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(GOOD))
    job = load_job(
        path, ["train.steps=7", "scale.workers={min: 1, max: 4}", "data.columns={text: review}", "name=other"]
    )
    assert (job.train.steps, job.train.epochs) == (7, None)
    assert load_job(path, ["train.steps=7", "train.epochs=null"]).train == job.train
    assert (job.scale.min_workers, job.scale.max_workers, job.column("text"), job.name) == (1, 4, "review", "other")
    with pytest.raises(JobError, match=r"train\.step: unknown key; did you mean 'steps'"):
        load_job(path, ["train.step=7"])
    with pytest.raises(JobError, match="not of the form"):
        load_job(path, ["train.steps"])


def test_identity_depends_on_what_trains_the_weights_and_on_nothing_else() -> None:
    job = parse_job(GOOD)

    def identity(**sections: Any) -> str:
        return parse_job(changed(**sections)).identity()

    same: list[dict[str, Any]] = [{"scale": {"workers": 2}}, {"storage": "/elsewhere"}, {"checkpoint": {"keep": 9}}]
    other: list[dict[str, Any]] = [{"train": {"seed": 1}}, {"data": {"max_length": 9}}, {"model": {"dtype": "float32"}}]
    assert {identity(**change) for change in same} == {job.identity()}
    assert len({job.identity(), *(identity(**change) for change in other)}) == 4


def test_a_loaded_job_survives_being_written_and_read_again(tmp_path: Path) -> None:
    job = load_job(write(tmp_path, yaml.safe_dump(GOOD)))
    assert parse_job(yaml.safe_load(yaml.safe_dump(job.model_dump(mode="json")))) == job
    assert isinstance(job, Job)
