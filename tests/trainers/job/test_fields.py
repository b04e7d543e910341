"""What is said at a field of the job file is what the file, the shards' key and the tasks go by; no list beside it."""

from pathlib import Path
from typing import Any

import pytest

from trainers.errors import JobError
from trainers.job.load import load_job, parse_job, task_fields
from trainers.job.task_fields import For
from trainers.shards.keys import plan_splits
from trainers.tasks import TASKS, task_options

VALUES: list[Any] = [True, 7, 0.25, "{{ messages }}", "balanced", "cosine", "intl", "a {source}", [1.0, 2.0],
                     {"fraction": 0.3}, {"teacher": "a/b"}, {"num_beams": 2}]  # fmt: skip
FIELDS = list(task_fields())


def plain(task: str, folder: Path, **sections: Any) -> dict[str, Any]:
    (folder / "d.jsonl").write_text("{}\n")
    (folder / "tokenizer.json").write_text("{}")
    parts = {"data": {"train": [str(folder / "d.jsonl")], "eval_fraction": 0.5}, "evaluate": {},
             "train": {"global_batch_size": 2, "steps": 1, "learning_rate": 1e-4}}  # fmt: skip
    for name, values in sections.items():
        parts[name] |= values
    return {"name": "x", "task": task, "model": {"path": str(folder)}, **parts}


def another(folder: Path, section: str, key: str, mark: For) -> Any:
    """A value that the field takes and that is not its default."""
    default = getattr(getattr(parse_job(plain(mark.tasks[0], folder)), section), key)
    for value in VALUES:
        try:
            job = parse_job(plain(mark.tasks[0], folder, **{section: {key: value}}))
        except JobError:
            continue
        if getattr(getattr(job, section), key) != default:
            return value
    raise AssertionError(f"no value for {section}.{key} among VALUES")


@pytest.mark.parametrize(("section", "key", "mark"), FIELDS, ids=[f"{section}.{key}" for section, key, _ in FIELDS])
def test_a_field_is_for_the_tasks_it_names_and_shapes_the_shards_it_says(
    tmp_path: Path, section: str, key: str, mark: For
) -> None:
    value = {section: {key: another(tmp_path, section, key, mark)}}
    for task in TASKS:
        if task in mark.tasks:
            parse_job(plain(task, tmp_path, **value))
        else:
            with pytest.raises(JobError, match=f"{section}.{key}: means nothing to task {task}"):
                parse_job(plain(task, tmp_path, **value))
    plainly, changed = (parse_job(plain(mark.tasks[0], tmp_path, **more)) for more in ({}, value))
    keys = [plan_splits(job, str(tmp_path))[0].key for job in (plainly, changed)]
    assert (keys[0] != keys[1]) == mark.shapes_shards
    if hasattr(task_options(changed), key):
        assert getattr(task_options(changed), key) == getattr(getattr(changed, section), key)


def test_every_task_option_is_declared_for_tasks_or_for_all() -> None:
    marked = {key for _, key, _ in FIELDS}
    own = set(type(task_options(parse_job(JOB))).model_fields)
    assert own - marked == {"seed", "dropout", "label_counts", "label_rows", "packing", "pack_length", "metrics"}


JOB = {"name": "x", "task": "mlm", "model": {"path": "m/x"}, "data": {"train": "t.txt", "eval": "e.txt"},
       "train": {"global_batch_size": 2, "steps": 1, "learning_rate": 1e-4}}  # fmt: skip


def test_one_path_stands_for_a_list_of_one_and_a_default_is_taken_from_the_files_folder_too(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        "{name: x, task: mlm, model: {path: m/x}, data: {train: {path: t.txt, weight: 2.0}, eval: e.txt}, "
        "train: {global_batch_size: 2, steps: 1, learning_rate: 1.0e-4}}"
    )
    job = load_job(file)
    assert (job.data.train_paths, job.data.eval) == ((f"{tmp_path}/t.txt",), (f"{tmp_path}/e.txt",))
    assert (job.storage, job.model.path) == (f"{tmp_path}/runs", "m/x")


def test_a_section_shows_its_own_fields_first() -> None:
    assert next(iter(parse_job(JOB).model_dump()["data"])) == "train"
