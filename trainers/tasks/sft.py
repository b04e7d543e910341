"""sft: supervised fine-tuning on conversations, with the loss on assistant turns only.

A row: {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}, or any of the
other shapes that `trainers.tasks.chat.conversations` reads.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from trainers.records import Array
from trainers.tasks.base import EncodeRules, Example, Serving
from trainers.tasks.causal import CausalTask, token_metrics
from trainers.tasks.chat.conversations import Chat, read_chat
from trainers.tasks.chat.render import Rendered, renderer_of
from trainers.tasks.chat.spans import HIDDEN, NOTES, UNSAID
from trainers.tasks.chat.turns import join_renderings, only_turns, render_each
from trainers.tasks.encoded import EncodedRow, TokenSequence, batch_rows
from trainers.tasks.generation import generate_texts
from trainers.tasks.metrics.generated_text import overlap_metrics, overlap_scores
from trainers.tasks.metrics.own import truth_column
from trainers.tasks.options import TaskOptions
from trainers.tokenizer.encoder import Encoder
from trainers.tokenizer.token_arrays import KEPT, TRUNCATED, EncodedBatch, Tokens, insert_rows, starts_of

OUTCOMES = (KEPT, TRUNCATED, "dropped:overlong", "dropped:no_target",
            *(f"{kept}:{note}" for note in NOTES for kept in (KEPT, TRUNCATED)))  # fmt: skip
NOTED = 4
"""Outcomes from here on are those of rows with a note, two for each."""
SAID = {
    HIDDEN: "thoughts in earlier turns, which the chat template leaves out; data.each_turn: true trains each in a "
    "rendering of its own",
    UNSAID: "a system message that the chat template leaves out",
}
SPANS = pa.list_(pa.int32())


class Sft(CausalTask):
    """Targets are what the assistant says, up to and including the token that ends its turn."""

    extra_schema = (("spans", SPANS),)
    metrics_known = ("loss", "perplexity", "token_accuracy", "rouge1", "rouge2", "rougeL", "rougeLsum", "exact_match")

    def encode(self, rows: Sequence[Mapping[str, Any]], encoder: Encoder, rules: EncodeRules) -> EncodedBatch:
        """Render each conversation with the chat template, tokenize it, and find the assistant's tokens."""
        chats = [read_chat(row) for row in rows]
        rendered = [_render(chat, encoder, rules.options) for chat in chats]
        unread = Counter(
            f"{key} in messages, which is not read"
            for chat in chats
            if not isinstance(chat, str)
            for key in chat.unread
        )
        usable = [index for index, result in enumerate(rendered) if not isinstance(result, str)]
        renderings = [result for result in rendered if not isinstance(result, str)]
        batch = _encode([one for some in renderings for one in some], encoder, rules)
        if rules.options.each_turn and renderings:
            batch = join_renderings(batch, [len(some) for some in renderings])
        batch = replace(batch, notes={**batch.notes, **unread})
        for note, said in SAID.items():
            noted = [code for code, name in enumerate(batch.outcomes) if name.endswith(f":{note}")]
            if count := int(np.isin(batch.codes, noted).sum()):
                batch = replace(batch, notes={**batch.notes, said: count})
        if len(usable) == len(rows):
            return batch
        outcomes = [f"dropped:{result}" if isinstance(result, str) else None for result in rendered]
        return insert_rows(batch, np.array(usable, dtype=np.int64), outcomes)

    def count_targets(self, table: pa.Table) -> Array:
        column = table["spans"].combine_chunks()
        flat, offsets = column.values.to_numpy(), column.offsets.to_numpy()
        running = np.concatenate([[0], np.cumsum(np.where(np.arange(len(flat)) % 2 == 1, flat, -flat))])
        targets: Array = running[offsets[1:]] - running[offsets[:-1]]
        return targets

    def target_mask(self, row: Example) -> Array:
        mask = np.zeros(len(row.input_ids), dtype=bool)
        spans = row.extra["spans"]
        for start, end in zip(spans[::2], spans[1::2], strict=True):
            mask[start:end] = True
        return mask

    def serving(self, encoder: Encoder) -> Serving:
        """The template of the job, and the added token that it puts behind an assistant's turn."""
        template = self.options.chat_template
        ending = renderer_of(encoder, encoder.fast, template).ending()
        ends = [number for token, number in encoder.tokenizer.get_added_vocab().items() if ending.startswith(token)]
        return Serving(template, tuple(ends))

    def prepare(self, encoder: Encoder) -> None:
        self._tokenizer = encoder.tokenizer

    def generate(self, model: Any, rows: Sequence[Example], pad_id: int) -> dict[str, Array]:
        """Where the job asks for texts: the last answer generated anew and compared with the one in the data."""
        if self.options.generate is None:
            return {}
        settings = self.options.generate.model_dump()
        turns = [row.extra["spans"][-2:] for row in rows]
        prompts = [row.input_ids[:start] for row, (start, _) in zip(rows, turns, strict=True)]
        ids = [row.input_ids[start:end] for row, (start, end) in zip(rows, turns, strict=True)]
        wanted = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        seed = (self.options.seed, min(row.index for row in rows))
        said = [text.strip() for text in generate_texts(model, prompts, self._tokenizer, pad_id, settings, seed)]
        return {
            **overlap_scores(said, wanted),
            "said": np.array(said, dtype=object),
            **truth_column(self.options, wanted),
        }

    def metrics(self, row_scores: Mapping[str, Array]) -> dict[str, float]:
        return {**token_metrics(row_scores), **(overlap_metrics(row_scores) if "rougeL" in row_scores else {})}

    def left_out(self, metric: str) -> str | None:
        silent = self.options.generate is None and metric not in CausalTask.metrics_known
        return "it compares generated texts; set evaluate.generate, such as {max_new_tokens: 128}" if silent else None


def _render(chat: Chat | str, encoder: Encoder, options: TaskOptions) -> Sequence[Rendered] | str:
    """The conversation as text with the assistant's spans, or the reason for dropping the row."""
    if isinstance(chat, str):
        return chat
    renderer = renderer_of(encoder, encoder.fast, options.chat_template)
    if options.each_turn:
        return render_each(lambda messages: renderer.render(messages, chat.tools), chat.messages, chat.muted)
    rendered = renderer.render(chat.messages, chat.tools)
    if isinstance(rendered, str):
        return rendered
    return (only_turns(rendered, set(rendered.turns) - chat.muted) if chat.muted else rendered,)


def _encode(rendered: Sequence[Rendered], encoder: Encoder, rules: EncodeRules) -> EncodedBatch:
    texts = [one.text for one in rendered]
    sizes = encoder.bytes_of_ids
    if sizes is not None:
        tokens = encoder.encode_ids(texts, special=False)
        running = starts_of(sizes[tokens.ids])
        spelled = np.diff(running[tokens.offsets])
        if np.array_equal(spelled, [len(text) if text.isascii() else len(text.encode()) for text in texts]):
            return _fit(tokens, running, rendered, rules)
    return _fit_by_offsets(rendered, encoder, rules)


def _fit(tokens: Tokens, running: Array, rendered: Sequence[Rendered], rules: EncodeRules) -> EncodedBatch:
    """Bytes to tokens for all spans at once, then the length policy.

    Args:
        running: int64 [tokens + 1]: bytes of all texts before each token.
    """
    lengths, limit = tokens.lengths, rules.max_length
    counts = np.fromiter((len(one.spans) for one in rendered), np.int64, len(rendered))
    row = np.repeat(np.arange(len(rendered)), counts)
    spans = np.array([span for one in rendered for span in one.spans], dtype=np.int64).reshape(-1, 2)
    spans += running[tokens.offsets[row]][:, None]
    first = np.searchsorted(running[1:], spans[:, 0], side="right") - tokens.offsets[row]
    last = np.searchsorted(running[:-1], spans[:, 1], side="left") - tokens.offsets[row]
    first, last = np.maximum(first, 1), np.minimum(last, limit)  # nothing predicts the first token
    told = first < last
    has_target = np.bincount(row[told], minlength=len(rendered)) > 0
    long = lengths > limit
    kept_when_long = OUTCOMES.index(TRUNCATED if rules.overlong == "truncate" else "dropped:overlong")
    codes = np.where(long, kept_when_long, np.where(has_target, 0, 3))
    codes = np.where((codes == 1) & ~has_target, 3, codes).astype(np.int32)
    kept = codes <= 1
    told &= kept[row]
    where = np.flatnonzero(kept)
    offsets = starts_of(2 * np.bincount(row[told], minlength=len(rendered))[where])
    flat = np.stack([first[told], last[told]], axis=1).ravel().astype(np.int32)
    shifts: dict[str | None, int] = {None: 0, **{note: NOTED + 2 * place for place, note in enumerate(NOTES)}}
    noted = np.fromiter((shifts[one.note] for one in rendered), np.int64, len(rendered))
    return EncodedBatch(
        tokens=tokens.take(tokens.offsets[where], np.minimum(lengths[where], limit)),
        row=where,
        part=np.zeros(len(where), np.int32),
        outcomes=OUTCOMES,
        codes=np.where(kept, codes + noted, codes).astype(np.int32),
        tokens_lost=np.where(codes == 1, lengths - limit, 0).astype(np.int32),
        extra={"spans": pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(flat))},
    )


def _fit_by_offsets(rendered: Sequence[Rendered], encoder: Encoder, rules: EncodeRules) -> EncodedBatch:
    """The same for tokenizers whose ids do not spell the text out: by the character offsets that they report."""
    rows = []
    for chat, encoding in zip(rendered, encoder.encode_with_offsets([chat.text for chat in rendered]), strict=True):
        raw = chat.text.encode()
        spans = [(len(raw[:start].decode()), len(raw[:end].decode())) for start, end in chat.spans]
        lost = max(len(encoding.ids) - rules.max_length, 0)
        ids = encoding.ids[: rules.max_length]
        targets = _token_spans(encoding.offsets[: len(ids)], spans)
        if lost and rules.overlong != "truncate":
            rows.append(EncodedRow.dropped("overlong"))
        elif not targets:
            rows.append(EncodedRow.dropped("no_target"))
        else:
            whole = EncodedRow.whole(TokenSequence(ids, {"spans": targets}), lost)
            rows.append(replace(whole, outcome=f"{whole.outcome}:{chat.note}") if chat.note else whole)
    return batch_rows(rows, Sft.extra_schema)


def _token_spans(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
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
