"""Predictions of every task are what its evaluation scored, row by row, though the rows come without their targets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainers.tasks.small import small_jobs, with_head
from trainers.evaluation import predict as predicting
from trainers.evaluation.evaluate import evaluate_model
from trainers.evaluation.predict import predict
from trainers.evaluation.row_views import costliest_rows, generations
from trainers.run.record import Run, find_run
from trainers.run.row_scores import write_row_scores
from trainers.storage import Folder

NAMES = ("classify causal", "several", "tag", "extract", "extract v2", "regression", "cosine", "T5", "sft",
         "seq2seq causal", "pretrain", "mlm")  # fmt: skip
TARGETS = {"label", "tags", "answers", "score", "target"}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return small_jobs(tmp_path_factory.mktemp("predict"))


def rows_of(run: Run) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in Path(run.job.data.eval[0]).read_text().splitlines()]
    columns = {column: field for field, column in (run.job.data.columns or {}).items()}
    return [{columns.get(name, name): value for name, value in row.items()} for row in rows]


@pytest.mark.parametrize("name", NAMES)
def test_predictions_are_what_the_evaluation_scored(jobs: dict[str, Any], tmp_path: Path, name: str) -> None:
    run = find_run(jobs[name])
    model, task = str(with_head(run, tmp_path / "model")), run.load_task()
    _, known = evaluate_model(run.job, task, model, run.open_shards("eval", task))
    rows = rows_of(run)
    bare = [{field: value for field, value in row.items() if field not in TARGETS} for row in rows]
    if name == "sft":
        bare = [{"messages": row["messages"][:-1]} for row in rows]
    said = list(predict(run.job, model, bare))
    assert len(said) == len(rows) == len(known["loss_sum"]) and not [one for one in said if "error" in one]
    told = [one.get("prediction") for one in said]
    if name == "classify causal":
        assert told == [task.labels[index] for index in known["prediction"]]
    elif name == "several":
        scores = [list(one["scores"].values()) for one in said]
        columns = [known[f"score_{index}"] for index in range(len(task.labels))]
        np.testing.assert_allclose(scores, np.stack(columns, 1), atol=1e-6)
    elif name == "tag":
        right = [sum(map(str.__eq__, tags, row["tags"])) for tags, row in zip(told, rows, strict=True)]
        assert right == known["words_right"].tolist()
    elif "extract" in name:
        np.testing.assert_allclose([one["score"] for one in said], known["score"], rtol=1e-5)
        np.testing.assert_allclose([one["no_answer_score"] for one in said], known["null_score"], rtol=1e-5)
        assert all(answer in row["context"] for answer, row in zip(told, rows, strict=True))
    elif name in ("regression", "cosine"):
        low, high = task.options.score_range if name == "cosine" else (0, 1)
        np.testing.assert_allclose(told, low + (high - low) * known["said"], rtol=1e-5, atol=1e-6)
    elif name in ("T5", "sft", "seq2seq causal"):
        assert told == known["said"].tolist()
    else:
        np.testing.assert_allclose([one["loss"] * one["targets"] for one in said], known["loss_sum"], rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["classify causal", "several", "tag", "extract", "regression", "T5", "sft", "pretrain"]
)
def test_the_costliest_rows_are_told_as_they_stand_in_the_data(jobs: dict[str, Any], tmp_path: Path, name: str) -> None:
    run = find_run(jobs[name]).model_copy(update={"folder": Folder(str(tmp_path / "run"))})
    model, task = str(with_head(run, tmp_path / "model")), run.load_task()
    rows, known = evaluate_model(run.job, task, model, run.open_shards("eval", task))
    write_row_scores(run.folder, 3, rows, known, task.labels)
    views = costliest_rows(run, 3, 5)
    losses = known["loss_sum"] / np.maximum(known.get("targets", 1), 1)
    np.testing.assert_allclose([view.loss for view in views], sorted(losses, reverse=True)[:5])
    data = Path(run.job.data.eval[0]).read_bytes()
    for view in views:
        raw = json.loads(data[view.row :].split(b"\n")[0])
        file, _, line = view.place.partition(":")
        assert file == Path(view.file).name and json.loads(data.splitlines()[int(line) - 1]) == raw
        said = " ".join(str(value) for value in raw.values())
        assert view.text and view.file == run.job.data.eval[0]
        assert not view.label or view.label.split()[0].strip(".,") in said or name == "regression"
    told = [view.prediction for view in generations(run, 3, 4)]
    assert told == (known["said"][:4].tolist() if name in ("T5", "sft") else [])


def test_a_row_that_cannot_be_used_says_why_in_its_place(jobs: dict[str, Any], tmp_path: Path) -> None:
    run = find_run(jobs["classify causal"])
    model = str(with_head(run, tmp_path / "model"))
    said = list(predict(run.job, model, [{"text": "dog"}, None, {"text": 3}, {}, {"text": "cat"}]))
    assert [one.get("error") for one in said] == [None, "malformed", "text_not_a_string", "missing_text", None]


ASKED = [{"role": "user", "content": "is it good"}, {"role": "assistant", "content": "a"},
         {"role": "user", "content": "is the film bad"}]  # fmt: skip
LONG = {"role": "user", "content": "the plot " * 60}


def shared(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As ShareGPT names them."""
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names[one["role"]], "value": one["content"]} for one in messages]


WAITING: dict[str, dict[str, Any]] = {
    "openai": {"messages": ASKED},
    "openai, answered": {"messages": [*ASKED, {"role": "assistant", "content": "gold"}]},
    "openai, answered at length": {"messages": [*ASKED, {"role": "assistant", "content": "gold " * 200}]},
    "openai, answered by another name": {"messages": [*ASKED, {"role": "gpt", "content": "gold"}]},
    "openai, the last muted": {"messages": [*ASKED, {"role": "assistant", "content": "gold", "weight": 0}]},
    "openai, an earlier one muted": {"messages": [ASKED[0], {**ASKED[1], "train": False}, ASKED[2]]},
    "sharegpt": {"conversations": shared(ASKED)},
    "sharegpt, answered": {"conversations": [*shared(ASKED), {"from": "gpt", "value": "gold"}]},
    "sharegpt under messages": {"messages": [*shared(ASKED), {"from": "gpt", "value": "gold"}]},
    "prompt": {"prompt": ASKED},
    "prompt, answered": {"prompt": ASKED, "completion": [{"role": "assistant", "content": "gold"}]},
    "alpaca": {"instruction": "is the film bad", "history": [["is it good", "a"]]},
    "alpaca, answered": {"instruction": "is the film bad", "history": [["is it good", "a"]], "output": "gold",
                         "reasoning": "gold"},
}  # fmt: skip


def test_a_conversation_of_any_shape_is_asked_for_its_last_answer(
    jobs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every shape, waiting or answered, gives one prompt; what does not fit, or asks nothing, is an error."""
    run, prompts = find_run(jobs["sft"]), []
    model = str(with_head(run, tmp_path / "model"))

    def watched(model: Any, given: list[Any], tokenizer: Any, *rest: Any) -> list[str]:
        prompts.extend(tokenizer.decode(one) for one in given)
        return ["said"] * len(given)

    monkeypatch.setattr(predicting, "generate_texts", watched)
    said = list(predict(run.job, model, WAITING.values()))
    assert said == [{"prediction": "said"}] * len(WAITING)
    assert len(set(prompts)) == 1 and "is the film bad" in prompts[0] and "gold" not in prompts[0]
    prompts.clear()
    one_turn: list[dict[str, Any]] = [{"conversations": shared(ASKED[2:])}, {"messages": ASKED[2:]}]
    assert list(predict(run.job, model, one_turn)) == [{"prediction": "said"}] * 2 and len(set(prompts)) == 1
    prompts.clear()
    alien = {"role": "alien", "content": "x"}
    odd: list[dict[str, Any]] = [{"messages": talk} for talk in ([*ASKED[:2], LONG], [LONG], [], [alien])]
    errors = [one.get("error") for one in predict(run.job, model, [*odd, {"text": "a"}])]
    assert errors == ["overlong", "overlong", "no_target", "unknown_role", "missing_messages"] and prompts == []


HIDING = (
    "{% for m in messages %}{% if m.role == 'user' %}[user]{% elif loop.last and m.reasoning_content %}<think>"
    "{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def test_a_conversation_that_is_trained_turn_by_turn_is_asked_for_its_last_answer(
    jobs: dict[str, Any], tmp_path: Path
) -> None:
    """The rendering of the first turn is the longer one: it alone shows that turn's thought."""
    run = find_run(jobs["sft"])
    model = str(with_head(run, tmp_path / "model"))
    talk = [
        {"role": "user", "content": "is it good"},
        {"role": "assistant", "content": "a", "reasoning": "the plot " * 9},
    ]
    row = {"messages": [*talk, {"role": "user", "content": "is the film bad"}]}

    def said(each_turn: bool) -> list[Any]:
        data = {"chat_template": HIDING, "each_turn": each_turn, "max_length": 256}
        job = run.job.model_copy(update={"data": run.job.data.model_copy(update=data)})
        return list(predict(job, model, [row]))

    assert said(each_turn=True) == said(each_turn=False) and "error" not in said(each_turn=True)[0]
