"""What a trained model says to rows of any source: one record a row, for people and programs. No shards, no labels.

Fields that only training needs may be missing; `FILLERS` puts something harmless there, so that rows are encoded
exactly as for training. A row that the task refuses, or that is too long for it, gets the reason instead of a
prediction. Begin at `predict`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from trainers.batching.batch_plan import AUTO_MICRO_BATCH_TOKENS
from trainers.evaluation.placement import load_to_evaluate
from trainers.job.schema import Job
from trainers.job.sections import GenerateSection
from trainers.sources.files import SourceFile
from trainers.sources.readers import check_columns, needed_fields, task_columns
from trainers.tasks import EncodeRules, Task, encode_rows, encode_rules, load_task, task_options
from trainers.tasks.base import Batch, Example
from trainers.tasks.chat.asking import await_answer
from trainers.tasks.generation import generate_texts
from trainers.tasks.metrics.classes import THRESHOLD
from trainers.tasks.metrics.spans import best_span
from trainers.tasks.tag import Tag
from trainers.tokenizer.encoder import Encoder, load_encoder

if TYPE_CHECKING:
    import torch

Fields = Mapping[str, Any]
Prediction = dict[str, Any]

ROWS_AT_ONCE = 1000
"""Rows that are sorted by length together; memory holds only these."""
NO_LIMIT = 2**31 - 1
"""Tokens of a sequence."""


def predict(job: Job, model_path: str, rows: Iterable[Fields | None]) -> Iterator[Prediction]:
    """One record a row, in order: `prediction` and what goes with it, or `error`.

    Args:
        job: how rows become sequences, the model's dtype, the settings of generation.
        model_path: a Hugging Face folder with this task's head.
        rows: the task's fields of each; None for a malformed row.
    """
    predictor = Predictor(job, model_path)
    for chunk in chunks(rows):
        yield from predictor.say(chunk)


def check_asked(job: Job, sources: Sequence[SourceFile], where: str) -> None:
    """Look at the start of each file: it has the columns that the task reads, but for those of the answers.

    Args:
        where: what names the files, for messages.

    Raises:
        DataError: for files that are not what they are said to be.
        JobError: for columns that are missing.
    """
    answers = ANSWERS.get(job.task, ())
    columns = {field: column for field, column in task_columns(job).items() if field not in answers}
    sets = needed_fields(job.task, job.data.prompt)
    check_columns(sources, columns, [[field for field in fields if field not in answers] for fields in sets], where)


def chunks(rows: Iterable[Fields | None]) -> Iterator[list[Fields | None]]:
    """Rows that are looked at together."""
    remaining = iter(rows)
    while chunk := list(islice(remaining, ROWS_AT_ONCE)):
        yield chunk


class Predictor:
    """A model that says something to rows."""

    def __init__(self, job: Job, model_path: str) -> None:
        self._job, self._task = job, load_task(job.task, task_options(job))
        self._encoder = load_encoder(model_path, job.model.trust_remote_code)
        if self._task.has_labels:
            self._task.labels = _labels(model_path, job.model.trust_remote_code)
        self._task.prepare(self._encoder)
        self._model, self._device = load_to_evaluate(job, self._task, model_path, self._encoder.pad_id)

    def say(self, rows: Sequence[Fields | None]) -> Iterator[Prediction]:
        """One record a row of a chunk."""
        return _predict_chunk(self._job, self._task, self._model, self._encoder, rows, self._device)


def _labels(model_path: str, trust_remote_code: bool) -> tuple[str, ...]:
    """The labels in the order of the model's answers, as its configuration names them."""
    from transformers import AutoConfig

    names = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code).id2label
    return tuple(names[index] for index in sorted(names))


def _predict_chunk(
    job: Job, task: Task, model: Any, encoder: Encoder, rows: Sequence[Fields | None], device: Any
) -> Iterator[Prediction]:
    filler = FILLERS[job.task]
    settled = ["dropped:malformed" if row is None else None for row in rows]
    encoded = encode_rows(task, [filler(row or {}, task) for row in rows], encoder, _rules(job), settled)
    parts: list[list[Prediction]] = [[] for _ in rows]
    extras = {name: values.to_pylist() for name, values in encoded.extra.items()}
    examples = [
        Example(place, encoded.tokens[place], {name: values[place] for name, values in extras.items()})
        for place in range(len(encoded.tokens))
    ]
    overlong = {one.index for one in examples if job.task == "sft" and _prompt_length(one) >= job.data.max_length}
    for index in overlong:
        parts[int(encoded.row[index])].append({"error": "overlong"})
    for group in _groups([one for one in examples if one.index not in overlong], job.evaluate.batch_size):
        said = PREDICTORS[job.task](task, model, group, encoder, job, device)
        for example, prediction in zip(group, said, strict=True):
            parts[int(encoded.row[example.index])].append(prediction)
    for own, code in zip(parts, encoded.codes, strict=True):
        yield _merge(own) if own else {"error": encoded.outcomes[code].removeprefix("dropped:")}


def _rules(job: Job) -> EncodeRules:
    """As for training, but a conversation asks for its last answer alone, before which nothing is cut off."""
    rules = encode_rules(job)
    options = rules.options.model_copy(update={"each_turn": False})
    return replace(rules, options=options, max_length=NO_LIMIT if job.task == "sft" else rules.max_length)


def _groups(examples: Sequence[Example], batch_size: int) -> Iterator[list[Example]]:
    order, start = sorted(examples, key=lambda one: -len(one.input_ids)), 0
    while start < len(order):
        longest = max(len(order[start].input_ids), 1)
        size = max(min(batch_size, AUTO_MICRO_BATCH_TOKENS // longest), 1)
        yield order[start : start + size]
        start += size


def _merge(parts: list[Prediction]) -> Prediction:
    """One record of a row that became several sequences: its likeliest answer, or its losses together."""
    if "score" in parts[0]:
        best = max(parts, key=lambda part: float(part["score"]))
        no_answer = min(part["no_answer_score"] for part in parts)
        return {**best, "no_answer_score": no_answer}
    if "loss" not in parts[0]:
        return parts[0]
    targets = sum(part["targets"] for part in parts)
    loss = sum(part["loss"] * part["targets"] for part in parts) / max(targets, 1)
    return {"loss": loss, "perplexity": float(np.exp(loss)), "targets": targets}


def _forward(
    task: Task, model: Any, group: Sequence[Example], encoder: Encoder, device: Any
) -> tuple[torch.Tensor, Batch]:
    import torch

    batch = task.collate([[example] for example in group], encoder.pad_id)
    inputs, _ = batch.to(device)
    with torch.inference_mode():
        return task.forward(model, inputs), batch


def _classify(
    task: Task, model: Any, group: Sequence[Example], encoder: Encoder, job: Job, device: Any
) -> list[Prediction]:
    logits = _forward(task, model, group, encoder, device)[0].double().cpu()
    if task.options.multi_label:
        return [
            {
                "prediction": [name for name, score in zip(task.labels, line, strict=True) if score >= THRESHOLD],
                "scores": dict(zip(task.labels, line, strict=True)),
            }
            for line in logits.sigmoid().tolist()
        ]
    scores = logits.softmax(-1)
    best, index = scores.max(-1)
    return [
        {"prediction": task.labels[place], "probability": probability}
        for place, probability in zip(index.tolist(), best.tolist(), strict=True)
    ]


def _tag(task: Task, model: Any, group: Sequence[Example], encoder: Encoder, job: Job, device: Any) -> list[Prediction]:
    assert isinstance(task, Tag)
    guesses = _forward(task, model, group, encoder, device)[0].argmax(-1).cpu().numpy()
    return [{"prediction": task.predicted_tags(line, row)} for line, row in zip(guesses, group, strict=True)]


def _extract(
    task: Task, model: Any, group: Sequence[Example], encoder: Encoder, job: Job, device: Any
) -> list[Prediction]:
    scores, said = _forward(task, model, group, encoder, device)[0].cpu().numpy(), []
    for (starts, ends), example in zip(scores, group, strict=True):
        first, spans = example.extra["context_start"], np.asarray(example.extra["offsets"]).reshape(-1, 2)
        start, end, score = best_span(starts[first : first + len(spans)], ends[first : first + len(spans)])
        text = example.extra["text"][spans[start, 0] : spans[end, 1]]
        said.append({"prediction": text, "score": score, "no_answer_score": float(starts[0]) + float(ends[0])})
    return said


def _similarity(
    task: Task, model: Any, group: Sequence[Example], encoder: Encoder, job: Job, device: Any
) -> list[Prediction]:
    scores = _forward(task, model, group, encoder, device)[0].double().cpu().tolist()
    low, high = task.options.score_range
    embeds = task.options.objective != "regression"  # a cosine, which training fits to the scaled score
    return [{"prediction": low + (high - low) * score if embeds else score} for score in scores]


def _generate(
    task: Task, model: Any, group: Sequence[Example], encoder: Encoder, job: Job, device: Any
) -> list[Prediction]:
    section = job.evaluate.generate or GenerateSection(max_new_tokens=job.data.max_target_length)
    prompts = [example.input_ids[: _prompt_length(example)] for example in group]
    seed = (job.train.seed, min(example.index for example in group))
    texts = generate_texts(model, prompts, encoder.tokenizer, encoder.pad_id, section.model_dump(), seed)
    return [{"prediction": text.strip()} for text in texts]


def _prompt_length(example: Example) -> int:
    """Of a conversation all before the last answer; of a source all of it."""
    return int(example.extra["spans"][-2]) if "spans" in example.extra else len(example.input_ids)


def _loss(
    task: Task, model: Any, group: Sequence[Example], encoder: Encoder, job: Job, device: Any
) -> list[Prediction]:
    import torch

    batch = task.collate([[example] for example in group], encoder.pad_id)
    with torch.inference_mode():
        numbers = task.score(task.answers(model, *batch.to(device)), batch)
    counts = np.maximum(numbers["targets"], 1)
    return [
        {"loss": float(loss) / count, "targets": int(count)}
        for loss, count in zip(numbers["loss_sum"], counts.tolist(), strict=True)
    ]


def _fill_label(row: Fields, task: Task) -> Fields:
    return {**row, "label": [] if task.options.multi_label else task.labels[0]}


def _fill_tags(row: Fields, task: Task) -> Fields:
    tokens = row.get("tokens")
    return {**row, "tags": [task.labels[0]] * (len(tokens) if isinstance(tokens, list) else 0)}


FILLERS: dict[str, Callable[[Fields, Task], Fields]] = {
    "classify": _fill_label,
    "tag": _fill_tags,
    "extract": lambda row, task: {**row, "answers": {"text": [], "answer_start": []}},
    "similarity": lambda row, task: {**row, "score": task.options.score_range[0]},
    "seq2seq": lambda row, task: {**row, "target": "-"},
    "sft": lambda row, task: await_answer(row),
    "pretrain": lambda row, task: row,
    "mlm": lambda row, task: row,
}
"""A row of each task with something where training has its target."""

ANSWERS: dict[str, tuple[str, ...]] = {
    "classify": ("label",),
    "tag": ("tags",),
    "extract": ("answers", "id"),
    "similarity": ("score",),
    "seq2seq": ("target",),
    "sft": ("completion", "output", "reasoning_content", "reasoning", "thinking"),
}
"""Fields of each task that only training and evaluation read."""

PREDICTORS: dict[str, Callable[[Task, Any, Sequence[Example], Encoder, Job, Any], list[Prediction]]] = {
    "classify": _classify,
    "tag": _tag,
    "extract": _extract,
    "similarity": _similarity,
    "seq2seq": _generate,
    "sft": _generate,
    "pretrain": _loss,
    "mlm": _loss,
}
"""What each task says to a batch, one record a sequence."""
