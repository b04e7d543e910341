"""Rows that cannot be used: dropped with a reason that the ledger counts, or refused before anything is trained."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import shard_locally, tiny_job, write_rows
from tests.trainers.tasks import small
from trainers.errors import DataError, JobError
from trainers.shards.drop_budget import check_shards
from trainers.sources.files import find_sources
from trainers.sources.formats import FORMATS, Span
from trainers.tasks import TaskOptions, load_task
from trainers.tasks.classify import MULTI_HOT
from trainers.verification.verify import verify_job

GOOD: dict[str, dict[str, Any]] = {
    "tag": small.tag_rows(1)[0],
    "extract": small.question_rows(1)[0],
    "similarity": {"sentence1": "the dog", "sentence2": "a cat", "score": 0.5},
    "seq2seq": {**small.echo_rows(1)[0], "target_language": "German"},
    "mlm": {"text": "the old dog ran ."},
    "classify": {"text": "the dog", "label": ["a", "b"]},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "classify": {"multi_label": True},
    "seq2seq": {"prompt": "to {target_language} : {source}"},
}

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("tag", {"tags": ["O"]}, "tokens_and_tags_of_unequal_length"),
    ("tag", {"tags": None}, "missing_tags"),
    ("tag", {"tokens": "ada was", "tags": "O O"}, "tokens_or_tags_not_a_list"),
    ("tag", {"tags": [1] * 6}, "tokens_or_tags_not_strings"),
    ("tag", {"tags": ["X-per"] * 6}, "tag_not_BIO_or_BIOES"),
    ("tag", {"tokens": [], "tags": []}, "no_tokens"),
    ("extract", {"answers": [{"text": "ada", "answer_start": 1}]}, "answer_not_at_its_offset"),
    ("extract", {"answers": [{"text": "", "answer_start": 0}]}, "empty_answer"),
    ("extract", {"answers": None}, "missing_answers"),
    ("extract", {"answers": ["ada"]}, "answers_not_understood"),
    ("extract", {"answers": {"text": ["ada"], "answer_start": []}}, "answers_not_understood"),
    ("extract", {"context": " "}, "empty_context"),
    ("extract", {"question": "who " * 80}, "question_leaves_no_room"),
    ("similarity", {"score": 1.5}, "score_outside_0_to_1"),
    ("similarity", {"score": float("nan")}, "score_outside_0_to_1"),
    ("similarity", {"score": "high"}, "score_not_a_number"),
    ("similarity", {"score": None}, "missing_score"),
    ("similarity", {"sentence2": ""}, "empty_sentence"),
    ("seq2seq", {"target": " "}, "empty_target"),
    ("seq2seq", {"target": None}, "missing_target"),
    ("seq2seq", {"source": 3}, "source_not_a_string"),
    ("seq2seq", {"target_language": None}, "missing_target_language"),
    ("seq2seq", {"target_language": ""}, "empty_target_language"),
    ("mlm", {"text": " "}, "empty_text"),
    ("classify", {"label": {"name": "a"}}, "label_not_a_list"),
    ("classify", {"label": [1.5]}, "label_not_a_name"),
    ("classify", {"label": [0.0, 1.0, 0.0, 0.0, 1.0, 0.0]}, MULTI_HOT),
    ("classify", {"label": [0, 1, 0, 0, 1]}, MULTI_HOT),
    ("classify", {"label": [True, False]}, MULTI_HOT),
    ("classify", {"label": "[0, 0, 1]"}, MULTI_HOT),
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.bert(tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize("task", sorted({task for task, _, _ in BAD}))
def test_bad_rows_are_in_the_ledger_each_with_its_reason(task: str, encoder: Path, tmp_path: Path) -> None:
    bad = [({**GOOD[task], **change}, reason) for name, change, reason in BAD if name == task]
    rows = [GOOD[task], *(row for row, _ in bad)]
    data = {"data": {"max_drop_fraction": 0.99, **OPTIONS.get(task, {})}}
    job = tiny_job(tmp_path, encoder, task, [GOOD[task], *rows, *rows, *rows, *rows], **data)
    job = job.model_copy(
        update={"data": job.data.model_copy(update={"train": (str(write_rows(tmp_path / "a.jsonl", rows)),)})}
    )
    outcomes = shard_locally(job).train.outcomes
    wanted = Counter(f"dropped:{reason}" for _, reason in bad) + Counter({"kept": 1})
    assert outcomes == dict(wanted)


def test_over_budget_rows_are_refused_with_the_reason_and_the_row(encoder: Path, tmp_path: Path) -> None:
    rows = [*small.tag_rows(9), {"tokens": ["ada", "ran"], "tags": ["O"]}]
    job = tiny_job(tmp_path, encoder, "tag", [*small.tag_rows(2), *rows])
    with pytest.raises(DataError, match="tokens_and_tags_of_unequal_length") as caught:
        check_shards(job, shard_locally(job))
    assert caught.value.exit_code == 4


def test_labels_given_as_zeros_and_ones_are_refused_with_what_to_write(encoder: Path, tmp_path: Path) -> None:
    hot = [[float((index + place) % 3 == 0) for place in range(6)] for index in range(20)]
    rows = [{"text": "the dog ran", "label": label} for label in hot]
    job = tiny_job(tmp_path, encoder, "classify", rows, data={"multi_label": True})
    with pytest.raises(DataError, match=r"(?s)not one of 16 rows can be used.*multi_hot: .*write the row's labels"):
        check_shards(job, shard_locally(job))
    indices = {"text": "the dog ran", "label": [0, 1]}
    assert load_task("classify").refusal(indices, TaskOptions(multi_label=True)) is None


def test_a_tag_that_only_the_evaluation_shows_is_refused(encoder: Path, tmp_path: Path) -> None:
    job = tiny_job(tmp_path, encoder, "tag", small.tag_rows(20))
    write_rows(tmp_path / "dev.jsonl", [{"tokens": ["ada"], "tags": ["B-robot"]}])
    with pytest.raises(DataError, match="'B-robot'"):
        check_shards(job, shard_locally(job))


def test_an_unknown_role_is_counted(tiny_chat_tokenizer: Path, tmp_path: Path) -> None:
    from tests.tiny import chat_rows, make_llama

    rows = [{"messages": [{"role": "robot", "content": "x"}]}, *chat_rows(20)]
    model = make_llama(tmp_path / "model", tiny_chat_tokenizer)
    job = tiny_job(tmp_path, model, "sft", rows[::-1], data={"max_length": 128})
    assert shard_locally(job).train.outcomes["dropped:unknown_role"] == 1


def test_a_tokenizer_without_a_chat_template_is_refused_and_one_from_the_job_does(
    encoder: Path, tmp_path: Path
) -> None:
    from tests.tiny import chat_rows

    job = tiny_job(tmp_path, small.llama(tmp_path / "llama"), "sft", chat_rows(10))
    with pytest.raises(DataError, match="chat_template"):
        shard_locally(job)
    template = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} . {% endfor %}"
    given = job.model_copy(update={"data": job.data.model_copy(update={"chat_template": template})})
    assert shard_locally(given).train.total("targets") > 0


def test_a_tokenizer_without_a_pad_token_pads_with_what_is_never_seen(encoder: Path, tmp_path: Path) -> None:
    model = small.llama(tmp_path / "llama")
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    job = tiny_job(tmp_path, model, "classify", [{"text": row["source"], "label": "ab"[i % 2]}
                                                 for i, row in enumerate(small.echo_rows(40))])  # fmt: skip
    from trainers.model.source import find_model

    prepared = find_model(job)
    assert prepared is not None
    found = verify_job(job, prepared)
    assert found.passed, found


def test_mlm_without_a_mask_token_is_refused(tiny_tokenizer: Path) -> None:
    from trainers.tokenizer.encoder import load_encoder

    with pytest.raises(JobError, match="no mask token"):
        load_task("mlm").prepare(load_encoder(str(tiny_tokenizer)))


def test_squad_files_are_read_as_published(tmp_path: Path) -> None:
    asked = [
        {"id": "1", "question": "Who?", "answers": [{"text": "Ada", "answer_start": 7}]},
        {"id": "2", "question": "Why?", "is_impossible": True, "answers": [],
         "plausible_answers": [{"text": "Ada", "answer_start": 7}]},
    ]  # fmt: skip
    article = {"title": "t", "paragraphs": [{"context": "It was Ada.", "qas": asked}, "no paragraph"]}
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"version": "v2.0", "data": [article]}))
    (source,) = find_sources([str(path)], None, "data.train")
    rows = [row for _, row in FORMATS["json"].read(source, Span(), ())]
    assert [row and (row["id"], row["question"], row["context"], row["answers"]) for row in rows] == [
        ("1", "Who?", "It was Ada.", asked[0]["answers"]),
        ("2", "Why?", "It was Ada.", []),
        None,
    ]


def test_numbers_of_an_evaluation_take_the_same_few_bytes_a_row_whatever_their_number() -> None:
    """What is kept grows by a fixed number of bytes a row; what metrics need beside it stays under 60 MB."""
    import tracemalloc

    import numpy as np

    task = load_task("similarity", TaskOptions(score_range=(0.0, 1.0)))
    peaks = {}
    for rows in (1_000, 100_000):
        draw = np.random.default_rng(0)
        row_scores = {"score": draw.random(rows), "said": draw.random(rows), "loss_sum": draw.random(rows)}
        assert sum(values.nbytes for values in row_scores.values()) == 24 * rows
        tracemalloc.start()
        task.metrics(row_scores)
        peaks[rows] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[100_000] < 60 * 2**20
