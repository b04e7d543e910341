"""sft: supervised fine-tuning on conversations, with the loss on assistant turns only.

A row: {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}, or
{"prompt": "Hi", "completion": "Hello!"}.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from trainers.tasks.base import Array, Encoded, EncodeRules, Row, Sequence
from trainers.tasks.causal import CausalTask, token_metrics
from trainers.tasks.generation import generate_texts
from trainers.tasks.texts import overlap_metrics, overlap_scores

if TYPE_CHECKING:
    from trainers.data.tokenizer import Encoder

ROLES = ("system", "user", "assistant", "tool")
Span = tuple[int, int]


class Sft(CausalTask):
    """Targets are what the assistant says, up to and including the token that ends its turn."""

    extra_schema = (("spans", pa.list_(pa.int32())),)
    metrics_known = ("loss", "perplexity", "token_accuracy", "rouge1", "rouge2", "rougeL", "rougeLsum", "exact_match")

    def encode(self, rows: Seq[Mapping[str, Any]], encoder: Encoder, rules: EncodeRules) -> list[Encoded]:
        """Render each conversation with the chat template, tokenize it, and find the assistant's tokens."""
        rendered = [_render(row, encoder, rules.options.chat_template) for row in rows]
        encodings = iter(encoder.encode_with_offsets([one[0] for one in rendered if not isinstance(one, str)]))
        return [
            Encoded.dropped(one) if isinstance(one, str) else _fit(next(encodings), one[1], rules) for one in rendered
        ]

    def count_targets(self, table: pa.Table) -> Array:
        """Tokens inside the assistant's spans."""
        column = table["spans"].combine_chunks()
        flat, offsets = column.values.to_numpy(), column.offsets.to_numpy()
        running = np.concatenate([[0], np.cumsum(np.where(np.arange(len(flat)) % 2 == 1, flat, -flat))])
        targets: Array = running[offsets[1:]] - running[offsets[:-1]]
        return targets

    def target_mask(self, row: Row) -> Array:
        """True inside the assistant's spans."""
        mask = np.zeros(len(row.input_ids), dtype=bool)
        spans = row.extra["spans"]
        for start, end in zip(spans[::2], spans[1::2], strict=True):
            mask[start:end] = True
        return mask

    def prepare(self, encoder: Encoder) -> None:
        """Keep the tokenizer, to read what was generated."""
        self._tokenizer = encoder.tokenizer

    def generate(self, model: Any, rows: Seq[Row], pad_id: int) -> dict[str, Array]:
        """Where the job asks for texts: the last answer generated anew and compared with the one in the data."""
        settings = self.options.generate
        if settings is None:
            return {}
        turns = [row.extra["spans"][-2:] for row in rows]
        prompts = [row.input_ids[:start] for row, (start, _) in zip(rows, turns, strict=True)]
        ids = [row.input_ids[start:end] for row, (start, end) in zip(rows, turns, strict=True)]
        wanted = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        seed = (self.options.seed, min(row.index for row in rows))
        said = [text.strip() for text in generate_texts(model, prompts, self._tokenizer, pad_id, settings, seed)]
        return {**overlap_scores(said, wanted), "said": np.array(said, dtype=object)}

    def metrics(self, judged: Mapping[str, Array]) -> dict[str, float]:
        """Over all target tokens; with texts also ROUGE and exact match."""
        return {**token_metrics(judged), **(overlap_metrics(judged) if "rougeL" in judged else {})}


def read_messages(row: Mapping[str, Any]) -> list[dict[str, Any]] | str:
    """The conversation of a row, or the reason why there is none."""
    messages = row.get("messages")
    if messages is None and row.get("prompt") is not None and row.get("completion") is not None:
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    if messages is None:
        return "missing_messages"
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        return "messages_not_a_list"
    if any(message.get("role") not in ROLES for message in messages):
        return "unknown_role"
    if not all(isinstance(message.get("content"), str) for message in messages):
        return "content_not_a_string"
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        return "no_target"
    return [dict(message) for message in messages]


def _render(row: Mapping[str, Any], encoder: Encoder, template: str | None) -> tuple[str, list[Span]] | str:
    """The conversation as text with the assistant's character spans, or the reason for dropping the row."""
    messages = read_messages(row)
    if isinstance(messages, str):
        return messages
    return find_assistant_spans(messages, encoder, template) or "template_hides_the_turns"


def find_assistant_spans(
    messages: Seq[dict[str, Any]], encoder: Encoder, template: str | None = None
) -> tuple[str, list[Span]] | None:
    """Where the assistant speaks in the rendered conversation.

    Each assistant turn is rendered once more with a marker for its content; what stands before and after the marker
    must stand before and after the content in the real text. None where a template rewrites contents so that this
    fails. The turn ends with the first special token after the content, which the model must learn to say.
    """
    text = encoder.render(messages, template)
    turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    markers = {turn: f"\ue000turn{turn}\ue001" for turn in turns}
    told = [{**m, "content": markers[i]} if i in markers else m for i, m in enumerate(messages)]
    marked = encoder.render(told, template)
    spans: list[Span] = []
    cursor = 0
    for turn in turns:
        before, found, marked = marked.partition(markers[turn])
        if not found or not text.startswith(before, cursor):
            return None
        start = cursor + len(before)
        content = messages[turn]["content"]
        said = content if text.startswith(content, start) else content.strip()
        if not text.startswith(said, start):
            return None
        end = start + len(said)
        spans.append((start, end + _turn_end(marked, encoder)))
        cursor = end
    return (text, spans) if text[cursor:] == marked else None


def _turn_end(after: str, encoder: Encoder) -> int:
    """Characters of the special token that directly follows a turn, 0 where there is none."""
    special = (token for token in encoder.tokenizer.all_special_tokens if after.startswith(token))
    return len(max(special, key=len, default=""))


def _fit(encoding: Any, spans: Seq[Span], rules: EncodeRules) -> Encoded:
    """Character spans to token spans, then the length policy."""
    lost = max(len(encoding.ids) - rules.max_length, 0)
    if lost and rules.overlong != "truncate":
        return Encoded.dropped("overlong")
    ids = encoding.ids[: rules.max_length]
    token_spans = _token_spans(encoding.offsets[: len(ids)], spans)
    if not token_spans:
        return Encoded.dropped("no_target")
    return Encoded.whole(Sequence(ids, {"spans": token_spans}), lost)


def _token_spans(offsets: Seq[Span], spans: Seq[Span]) -> list[int]:
    """Flat [start, end, start, end, ...] over tokens that overlap a character span; token 0 is never a target."""
    starts = np.array([start for start, _ in offsets], dtype=np.int64)
    ends = np.array([end for _, end in offsets], dtype=np.int64)
    flat: list[int] = []
    for start, end in spans:
        first = max(int(np.searchsorted(ends, start, side="right")), 1)
        last = int(np.searchsorted(starts, end, side="left"))
        if first < last:
            flat += [first, last]
    return flat
