"""extract: the span of a context that answers a question, or none. SQuAD files are read as published.

A row: {"question": "Who?", "context": "It was Ada.", "answers": [{"text": "Ada", "answer_start": 7}]}; no answers means
that the context does not say. A long context is read in overlapping windows, each a sequence of its own; evaluation
takes the best span over all windows of a question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from trainers.records import Array
from trainers.tasks.base import Batch, EncodeRules, Example, Task
from trainers.tasks.encoded import EncodedRow, TokenSequence, batch_rows
from trainers.tasks.metrics.guesses import guess_no_answer
from trainers.tasks.metrics.own import truth_column
from trainers.tasks.metrics.spans import best_span, merge_windows, span_metrics
from trainers.tasks.metrics.squad import score_v1, score_v2
from trainers.tasks.options import TaskOptions
from trainers.tasks.padding import as_inputs, places
from trainers.tokenizer.encoder import Encoder
from trainers.tokenizer.token_arrays import SPLIT, EncodedBatch

if TYPE_CHECKING:
    import torch

Answer = tuple[int, str]
"""First character in the context, and the text."""


class Extract(Task):
    """A question-answering head: a start and an end among the tokens, both at the first token for no answer."""

    extra_schema = (
        ("pair_start", pa.int32()),
        ("context_start", pa.int32()),
        ("text", pa.string()),
        ("offsets", pa.list_(pa.int32())),
        ("answer_tokens", pa.list_(pa.int32())),
        ("answers", pa.list_(pa.string())),
        ("window", pa.int32()),
    )
    """Of a window: where its context begins (as a token), that context's text, [start, end, ...] characters of its
    tokens there, the answer's first and last token, all answers of the question, and the window's number."""
    metric = "f1"
    auto_class = "AutoModelForQuestionAnswering"
    new_head = True
    metrics_known = ("f1", "exact", "best_f1", "best_exact", "loss")

    def refusal(self, row: Mapping[str, Any], options: TaskOptions) -> str | None:
        answers = read_answers(row)
        return answers if isinstance(answers, str) else None

    def encode(self, rows: Sequence[Mapping[str, Any]], encoder: Encoder, rules: EncodeRules) -> EncodedBatch:
        """Cut each context into windows and find the answer in each."""
        return batch_rows((_encode(row, encoder, rules) for row in rows), self.extra_schema)

    def target_tokens(self, row: Example) -> tuple[Array, Array]:
        places, (first, last) = np.arange(len(row.input_ids)), row.extra["answer_tokens"]
        return row.input_ids, (places >= first) & (places <= last)

    def collate(self, packs: Sequence[Sequence[Example]], pad_id: int, draw: int = 0) -> Batch:
        """Windows padded on the right; labels [windows, 2] are the answer's first and last token."""
        rows = [row for pack in packs for row in pack]
        labels = np.array([row.extra["answer_tokens"] for row in rows], dtype=np.int64)
        return Batch(as_inputs(rows, pad_id), labels, places(rows), tuple(rows))

    def read(self, outputs: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Start and end scores, [windows, 2, seq]; padding is never chosen."""
        import torch

        scores = torch.stack([outputs.start_logits, outputs.end_logits], dim=1).float()
        return scores.masked_fill(inputs["attention_mask"][:, None] == 0, torch.finfo(scores.dtype).min)

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Mean of the cross entropies of start and end, summed over windows."""
        return super().loss_sum(logits, labels, targets) / 2

    def score(self, logits: torch.Tensor, batch: Batch) -> dict[str, Array]:
        """Of each window: its loss, its best span with score, exact match and F1, and the score of no answer."""
        import torch

        logits, labels = logits.detach().cpu(), torch.from_numpy(batch.labels)
        losses = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none").mean(-1).double().numpy()
        lines = [_score_window(row, scores) for row, scores in zip(batch.documents, logits.numpy(), strict=True)]
        columns = {name: [line[name] for line in lines] for name in lines[0]}
        spans = np.array(columns.pop("span"), dtype=object)
        truth = truth_column(self.options, [row.extra["answers"] for row in batch.documents])
        return {"loss_sum": losses, **{name: np.array(one) for name, one in columns.items()}, "span": spans, **truth}

    def merge(self, rows: Array, row_scores: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        return merge_windows(rows, row_scores)

    def metrics(self, row_scores: Mapping[str, Array]) -> dict[str, float]:
        return span_metrics(row_scores, self.options.no_answer_threshold)

    def guesses(self, row_scores: Mapping[str, Array], seed: int) -> dict[str, dict[str, Array]]:
        return guess_no_answer(row_scores)


def read_answers(row: Mapping[str, Any]) -> list[Answer] | str:
    """The answers of a row, none where the context does not say; or the reason why the row cannot be used."""
    question, context, answers = row.get("question"), row.get("context"), row.get("answers")
    for name, value in (("question", question), ("context", context)):
        if not isinstance(value, str):
            return f"missing_{name}" if value is None else f"{name}_not_a_string"
        if not value.strip():
            return f"empty_{name}"
    if isinstance(answers, Mapping):  # columns, as the datasets library has them
        texts, starts = answers.get("text"), answers.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            return "answers_not_understood"
        answers = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    if not isinstance(answers, list) or not all(isinstance(answer, Mapping) for answer in answers):
        return "missing_answers" if answers is None else "answers_not_understood"
    valid: list[Answer] = []
    for answer in answers:
        text, start = answer.get("text"), answer.get("answer_start")
        if not isinstance(text, str) or not isinstance(start, int):
            return "answers_not_understood"
        if not text:
            return "empty_answer"
        if start < 0 or str(context)[start : start + len(text)] != text:
            return "answer_not_at_its_offset"
        valid.append((start, text))
    return valid


def _encode(row: Mapping[str, Any], encoder: Encoder, rules: EncodeRules) -> EncodedRow:
    answers = read_answers(row)
    assert isinstance(answers, list)  # `refusal` let it pass
    pair = (row["question"].strip(), row["context"])
    overlap = min(rules.options.window_overlap, rules.max_length // 2)
    try:
        ((first, *others),) = encoder.encode_windows([pair], rules.max_length, overlap)
    except ValueError:
        return EncodedRow.dropped("question_leaves_no_room")
    if others and rules.overlong != "split":
        return EncodedRow.dropped("overlong")
    windows = tuple(_window(one, number, row["context"], answers) for number, one in enumerate([first, *others]))
    return EncodedRow(SPLIT, windows) if others else EncodedRow.whole(windows[0])


def _window(encoding: Any, number: int, context: str, answers: list[Answer]) -> TokenSequence:
    places = [place for place, side in enumerate(encoding.sequence_ids) if side == 1]
    first, last = places[0], places[-1]
    spans = encoding.offsets[first : last + 1]
    base = spans[0][0]
    second = next((place for place, kind in enumerate(encoding.type_ids) if kind == 1), 0)
    extra = {
        "pair_start": second,
        "context_start": first,
        "text": context[base : spans[-1][1]],
        "offsets": [number - base for span in spans for number in span],
        "answer_tokens": _find(spans, first, answers),
        "answers": [text for _, text in answers],
        "window": number,
    }
    return TokenSequence(encoding.ids, extra)


def _find(spans: Sequence[tuple[int, int]], first: int, answers: Sequence[Answer]) -> list[int]:
    """First and last token of the first answer, [0, 0] where the window does not hold it whole."""
    if not answers:
        return [0, 0]
    start, end = answers[0][0], answers[0][0] + len(answers[0][1])
    if start < spans[0][0] or end > spans[-1][1]:
        return [0, 0]
    begins = max(place for place, span in enumerate(spans) if span[0] <= start)
    ends = min(place for place, span in enumerate(spans) if span[1] >= end)
    return [first + begins, first + max(ends, begins)]


def _score_window(row: Example, scores: Array) -> dict[str, Any]:
    extra = row.extra
    first, spans = extra["context_start"], np.asarray(extra["offsets"]).reshape(-1, 2)
    start, end, score = best_span(scores[0][first : first + len(spans)], scores[1][first : first + len(spans)])
    said, answers = extra["text"][spans[start, 0] : spans[end, 1]], extra["answers"]
    (exact_v1, f1_v1), (exact_v2, f1_v2) = score_v1(said, answers), score_v2(said, answers)
    empty, _ = score_v2("", answers)
    return {
        "window": extra["window"],
        "span": said,
        "score": score,
        "null_score": float(scores[0][0]) + float(scores[1][0]),
        "exact_v1": exact_v1,
        "f1_v1": f1_v1,
        "exact_v2": exact_v2,
        "f1_v2": f1_v2,
        "empty": empty,
        "answers": len(answers),
    }
