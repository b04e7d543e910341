"""Two text files, line by line, as parallel texts are published."""

import gzip
from pathlib import Path
from typing import Any

import pytest

from trainers.errors import DataError, JobError
from trainers.job.load import load_job
from trainers.shards.keys import plan_splits, split_sources
from trainers.sources.readers import plan_units, read_unit

JOB = """
name: translate
task: seq2seq
model: {path: MODEL, dtype: float32}
data: {train: [{source: x.en, target: x.fr.gz}], eval: {source: "d*.en", target: "d*.fr"}, max_length: 64}
train: {global_batch_size: 2, steps: 1, learning_rate: 1e-4}
storage: storage
"""


@pytest.fixture
def job_file(tmp_path: Path, tiny_chat_tokenizer: Path) -> Path:
    (tmp_path / "x.en").write_text("\ufeffthe film\n\nthe plot\r\n", encoding="utf-8")
    (tmp_path / "x.fr.gz").write_bytes(gzip.compress(b"le film\nrien\n\xff\n"))
    for name, lines in {"d1.en": "a", "d2.en": "b", "d1.fr": "un", "d2.fr": "deux"}.items():
        (tmp_path / name).write_text(lines)
    path = tmp_path / "job.yaml"
    path.write_text(JOB.replace("MODEL", str(tiny_chat_tokenizer)))
    return path


def rows_of(sources: Any) -> list[Any]:
    columns = {"source": "source", "target": "target"}
    return [row for unit in plan_units(sources) for row in read_unit(unit, sources[unit.file], columns)]


def test_lines_of_two_files_are_rows(job_file: Path, shard_here: Any) -> None:
    job = load_job(job_file, ["data.max_drop_fraction=1.0"])
    sources = split_sources(job)
    assert rows_of(sources["train"]) == [
        (0, {"source": "the film", "target": "le film"}),
        (1, {"source": "", "target": "rien"}),
        (2, None),
    ]
    assert [row for _, row in rows_of(sources["eval"])] == [
        {"source": "a", "target": "un"},
        {"source": "b", "target": "deux"},
    ]
    shards = shard_here(job)
    assert shards.train.outcomes == {"dropped:empty_source": 1, "dropped:malformed": 1, "kept": 1}
    assert shards.train.sources == (f"{job_file.parent}/x.en | {job_file.parent}/x.fr.gz",)


def test_either_file_decides_the_key(job_file: Path, tiny_chat_tokenizer: Path) -> None:
    job, keys = load_job(job_file), []
    for target in ("un", "une"):
        (job_file.parent / "d1.fr").write_text(target)
        keys.append(plan_splits(job, str(tiny_chat_tokenizer))[1].key)
    assert keys[0] != keys[1]


def test_files_of_unequal_length_are_refused(job_file: Path) -> None:
    (job_file.parent / "d2.fr").write_text("deux\ntrois\n")
    with pytest.raises(DataError, match=r"d2\.en ends after 1 lines and the other file goes on"):
        rows_of(split_sources(load_job(job_file))["eval"])


def test_globs_must_match_pairs(job_file: Path) -> None:
    (job_file.parent / "d3.en").write_text("c")
    with pytest.raises(JobError, match="3 and 2 files; parallel texts are pairs"):
        split_sources(load_job(job_file))


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("[{source: x.en}]", "an entry has source; give a path, or source and target"),
        ("[{source: x.en, target: x.fr.gz, path: x}]", "give a path, or source and target"),
        ("[{source: x.en, target: x.fr.gz, weight: 2.0, tokens: 5}]", "a weight and a number of tokens"),
        ("[{sorce: x.en, target: x.fr.gz}]", "sorce"),
    ],
)
def test_entries_that_make_no_sense_are_refused(entry: str, says: str, job_file: Path) -> None:
    with pytest.raises(JobError, match=says):
        load_job(job_file, [f"data.train={entry}"])


def test_pairs_are_for_seq2seq_and_weights_for_training(job_file: Path) -> None:
    text = job_file.read_text()
    job_file.write_text(text.replace("task: seq2seq", "task: pretrain").replace('d*.en",', 'd*.en", weight: 2.0,'))
    with pytest.raises(JobError) as caught:
        load_job(job_file)
    assert "source and target are for seq2seq, not pretrain" in str(caught.value)
    assert "which are for data.train alone" in str(caught.value)
