"""seq2seq: a text from a text, such as translation or summarization.

A row: {"source": "Two young men.", "target": "Zwei junge Maenner."}. Encoder-decoders (T5, BART, Marian) read the
source and write the target; causal models read it through `data.prompt` and go on with the target. `data.prompt` also
holds what a model expects before a source, such as "translate English to German: {source}"; for rows in several
languages "translate {source_language} to {target_language}: {source}", or ">>{target_language}<< {source}".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainers.architecture import plain_model
from trainers.job.sections import GenerateSection
from trainers.job.task_fields import PLACE
from trainers.records import Array
from trainers.tasks.base import IGNORE, Batch, EncodeRules, Example, Serving, Task
from trainers.tasks.causal import token_metrics
from trainers.tasks.encoded import EncodedRow, TokenSequence, batch_rows
from trainers.tasks.generation import generate_texts
from trainers.tasks.losses import TokenScores, by_line, score_tokens
from trainers.tasks.metrics.generated_text import (
    overlap_metrics,
    overlap_scores,
    signatures,
    translation_counts,
    translation_metrics,
)
from trainers.tasks.metrics.own import truth_column
from trainers.tasks.options import TaskOptions
from trainers.tasks.padding import as_inputs, pad_right, places
from trainers.tokenizer.encoder import Encoder
from trainers.tokenizer.token_arrays import EncodedBatch

if TYPE_CHECKING:
    import torch

CAUSAL_PROMPT = "{source}\n"
"""How a causal model gets a source where the job does not say: the target begins on a line of its own."""


class Seq2Seq(Task):
    """Cross entropy over the target's tokens, given the source; evaluation generates."""

    extra_schema = (("target", pa.list_(pa.int32())), ("reference", pa.string()), ("causal", pa.bool_()))
    metric = "loss"
    over_vocabulary = True
    auto_class = "AutoModelForSeq2SeqLM"
    forward_options = MappingProxyType({"use_cache": False})
    metrics_known = ("loss", "perplexity", "token_accuracy", "bleu", "chrf", "rouge1", "rouge2", "rougeL",
                     "rougeLsum", "exact_match")  # fmt: skip

    def head_class(self, config: Any) -> str:
        return self.auto_class if config.is_encoder_decoder else "AutoModelForCausalLM"

    def refusal(self, row: Mapping[str, Any], options: TaskOptions) -> str | None:
        for name in sorted({"source", "target", *PLACE.findall(options.prompt or "")}):
            text = row.get(name)
            if not isinstance(text, str):
                return f"missing_{name}" if text is None else f"{name}_not_a_string"
            if not text.strip():
                return f"empty_{name}"
        return None

    def encode(self, rows: Sequence[Mapping[str, Any]], encoder: Encoder, rules: EncodeRules) -> EncodedBatch:
        """Tokenize sources and targets apart."""
        causal = not encoder.is_encoder_decoder
        prompt = rules.options.prompt or (CAUSAL_PROMPT if causal else "{source}")
        prompts = [PLACE.sub(lambda place, row=row: row[place[1]], prompt) for row in rows]  # type: ignore[misc]
        sources = encoder.encode(prompts, special=not causal)
        as_sources = not causal and encoder.target_affixes is None
        targets = encoder.encode([row["target"] for row in rows], special=as_sources)
        encoded = (_fit(*row, causal, encoder, rules) for row in zip(rows, sources, targets, strict=True))
        return batch_rows(encoded, self.extra_schema)

    def count_targets(self, table: pa.Table) -> Array:
        targets: Array = pc.list_value_length(table["target"]).to_numpy().astype(np.int64)
        return targets

    def target_tokens(self, row: Example) -> tuple[Array, Array]:
        target = np.asarray(row.extra["target"], dtype=np.int64)
        return np.concatenate([row.input_ids, target]), np.arange(len(row.input_ids) + len(target)) >= len(
            row.input_ids
        )

    def prepare(self, encoder: Encoder) -> None:
        self._tokenizer = encoder.tokenizer
        self._apart = encoder.is_encoder_decoder
        self._first = encoder.first_tokens if self._apart else {}

    def serving(self, encoder: Encoder) -> Serving:
        return Serving(first_tokens=tuple(encoder.first_tokens.items()) if encoder.is_encoder_decoder else ())

    def spans(self, lengths: Array, targets: Array) -> Array:
        """Source and target in one line, or the longer of the two, each measured by the longest of its kind."""
        if not self._apart or not len(lengths):
            return lengths.astype(np.int64) + targets
        spans: Array = np.ceil(np.maximum(lengths, targets * (lengths.max() / max(targets.max(), 1)))).astype(np.int64)
        return spans

    def collate(self, packs: Sequence[Sequence[Example]], pad_id: int, draw: int = 0) -> Batch:
        """Sources and targets padded on the right; of a causal model source and target as one line."""
        rows = [row for pack in packs for row in pack]
        targets = [np.asarray(row.extra["target"], dtype=np.int64) for row in rows]
        if not rows[0].extra["causal"]:
            labels = pad_right(targets, IGNORE)
            return Batch({**as_inputs(rows, pad_id), "target_ids": pad_right(targets, pad_id)}, labels, places(rows))
        whole = [Example(row.index, np.concatenate([row.input_ids, target]), {})
                 for row, target in zip(rows, targets, strict=True)]  # fmt: skip
        lines = [np.concatenate([np.full(len(row.input_ids) - 1, IGNORE), target, [IGNORE]])
                 for row, target in zip(rows, targets, strict=True)]  # fmt: skip
        return Batch(as_inputs(whole, pad_id), pad_right(lines, IGNORE), places(rows))

    def outputs(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> Any:
        """What the model class returns; the decoder reads the target shifted as the class itself shifts labels."""
        given = dict(inputs)
        if "target_ids" in given:
            given["decoder_input_ids"] = _shift_right(plain_model(model), given.pop("target_ids"))
        return super().outputs(model, given)

    def score(self, logits: torch.Tensor | TokenScores, batch: Batch) -> dict[str, Array]:
        return score_tokens(logits, batch.labels, by_line(batch.labels), len(batch.rows))

    def generate(self, model: Any, rows: Sequence[Example], pad_id: int) -> dict[str, Array]:
        """Counts and scores of the generated texts against the targets as they stand in the data."""
        greedy = GenerateSection(max_new_tokens=self.options.max_target_length)
        settings = (self.options.generate or greedy).model_dump() | self._first
        prompts, wanted = [row.input_ids for row in rows], [row.extra["reference"] for row in rows]
        seed = (self.options.seed, min(row.index for row in rows))
        said = [text.strip() for text in generate_texts(model, prompts, self._tokenizer, pad_id, settings, seed)]
        counts = translation_counts(said, wanted, self.options.bleu_tokenize)
        return {
            **counts,
            **overlap_scores(said, wanted),
            "said": np.array(said, dtype=object),
            **truth_column(self.options, wanted),
        }

    def metrics(self, row_scores: Mapping[str, Array]) -> dict[str, float]:
        metrics = token_metrics(row_scores)
        if "bleu_0" in row_scores:
            metrics |= translation_metrics(row_scores, self.options.bleu_tokenize) | overlap_metrics(row_scores)
        return metrics

    def notes(self) -> dict[str, str]:
        return signatures(self.options.bleu_tokenize)


def _fit(
    row: Mapping[str, Any], source: Any, target: Any, causal: bool, encoder: Encoder, rules: EncodeRules
) -> EncodedRow:
    """Apply the length policy; a target keeps its end, a source of an encoder what stands around it, and a prompt of a
    causal model loses its start."""
    if not causal and (other := encoder.other_language(row)):
        return EncodedRow.dropped(f"{other}_is_not_that_of_the_tokenizer")
    before, after = (None if causal else encoder.target_affixes) or ((), ())
    answer, ending = [*before, *target.ids, *after], max(len(after), 1)
    if encoder.eos_id is not None and (causal or encoder.eos_id not in answer[-ending:]):
        answer.append(encoder.eos_id)
    begin = encoder.affixes[0] if causal and encoder.affixes else []
    read, most = [*begin, *source.ids], rules.options.max_target_length
    room = rules.max_length - min(len(answer), most) if causal else rules.max_length
    lost = max(len(answer) - most, 0) + max(len(read) - room, 0)
    if lost and (rules.overlong != "truncate" or room <= len(begin) or most <= len(before) + len(after)):
        return EncodedRow.dropped("overlong")
    if not source.ids:
        return EncodedRow.dropped("empty_source")
    if len(answer) > most:
        answer = [*answer[: most - ending], *answer[-ending:]]
    if len(read) > room:
        end = room - len(begin) if causal else len(encoder.affixes[1]) if encoder.affixes else 1
        read = [*(begin if causal else read[: room - end]), *read[len(read) - end :]]
    return EncodedRow.whole(TokenSequence(read, {"target": answer, "reference": row["target"], "causal": causal}), lost)


def _shift_right(model: Any, target: Any) -> Any:
    """What a decoder reads in order to write `target` [batch, seq], padded with the padding id: most begin with the
    configuration's start token, those of many languages with the target's last token, which names its language."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=target)
    shifted = target.roll(1, dims=1)
    shifted[:, 0] = model.config.decoder_start_token_id
    return shifted
