"""similarity: how alike two sentences are, as a score in a known range.

A row: {"sentence1": "A plane is taking off.", "sentence2": "An air plane is taking off.", "score": 5.0}. The objective
`regression` puts a head on the pair; `cosine` and `contrastive` embed each sentence by itself (mean of its tokens) and
compare. Contrastive is the pairwise form with a margin (Hadsell et al. 2006): a loss with the other rows of the batch
as negatives would depend on how a step is cut into micro-batches, which nothing here may.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import tee
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from trainers.records import Array
from trainers.tasks.base import Batch, EncodeRules, Example, Task
from trainers.tasks.classify import fit_pair
from trainers.tasks.encoded import EncodedRow, TokenSequence, batch_rows
from trainers.tasks.losses import find_targets
from trainers.tasks.metrics.correlations import correlation_draws
from trainers.tasks.options import TaskOptions
from trainers.tasks.padding import as_inputs, places
from trainers.tokenizer.encoder import Encoder
from trainers.tokenizer.token_arrays import EncodedBatch

if TYPE_CHECKING:
    import torch

DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+")
MARGIN = 0.5
"""Cosine distance beyond which an unlike pair costs nothing, as sentence-transformers has it."""
ALIKE = 0.5
"""Scaled score from which a pair counts as alike in the contrastive loss."""


class Similarity(Task):
    """A regression over pairs, or two embeddings compared."""

    extra_schema = (("score", pa.float64()), ("pair_start", pa.int32()))
    metric = "spearman"
    metrics_known = ("spearman", "pearson", "mse", "loss")
    smaller_is_better = frozenset({"loss", "mse"})
    auto_class = "AutoModel"

    @property
    def embeds(self) -> bool:
        """Whether each sentence is embedded by itself."""
        return self.options.objective != "regression"

    @property
    def new_head(self) -> bool:  # type: ignore[override]
        """The regression head is new; embeddings say something before training."""
        return not self.embeds

    def head_class(self, config: Any) -> str:
        return "AutoModel" if self.embeds else "AutoModelForSequenceClassification"

    def refusal(self, row: Mapping[str, Any], options: TaskOptions) -> str | None:
        first, second, score = row.get("sentence1"), row.get("sentence2"), row.get("score")
        if first is None or second is None:
            return "missing_sentence"
        if score is None:
            return "missing_score"
        if not isinstance(first, str) or not isinstance(second, str):
            return "sentence_not_a_string"
        if not first.strip() or not second.strip():
            return "empty_sentence"
        if isinstance(score, bool) or not isinstance(score, int | float):
            with_comma = isinstance(score, str) and DECIMAL_COMMA.fullmatch(score.strip())
            return "score_with_a_decimal_comma" if with_comma else "score_not_a_number"
        low, high = options.score_range
        return None if low <= score <= high else f"score_outside_{low:g}_to_{high:g}"

    def encode(self, rows: Sequence[Mapping[str, Any]], encoder: Encoder, rules: EncodeRules) -> EncodedBatch:
        """Tokenize pairs together, or each sentence by itself one after the other."""
        encode = _encode_apart if rules.options.objective != "regression" else _encode_pairs
        return batch_rows(encode(rows, encoder, rules), self.extra_schema)

    def config_changes(self) -> dict[str, Any]:
        return {} if self.embeds else {"num_labels": 1, "problem_type": "regression"}

    def collate(self, packs: Sequence[Sequence[Example]], pad_id: int, draw: int = 0) -> Batch:
        """Pairs as rows, or all first sentences followed by all second ones."""
        rows = [row for pack in packs for row in pack]
        shown = [half for side in (0, 1) for row in rows if (half := _half(row, side))] if self.embeds else rows
        scores = np.array([row.extra["score"] for row in rows], dtype=np.float32)
        return Batch(as_inputs(shown, pad_id), scores, places(rows))

    def read(self, outputs: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The head's score, or the cosine of the two embeddings; [rows]."""
        if not self.embeds:
            return super().read(outputs, inputs).squeeze(-1)
        from torch.nn.functional import cosine_similarity

        states = outputs.last_hidden_state.float()
        mask = inputs["attention_mask"].unsqueeze(-1).float()
        first, second = ((states * mask).sum(1) / mask.sum(1)).chunk(2)
        return cosine_similarity(first, second)

    def _scaled(self, scores: Any) -> Any:
        low, high = self.options.score_range
        return (scores - low) / (high - low)

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Squared error, of the score or of the cosine with the scaled score, or the contrastive loss; summed."""
        targets = find_targets(labels) if targets is None else targets
        summed: torch.Tensor = self._losses(
            logits.index_select(0, targets).float(), labels.index_select(0, targets)
        ).sum()
        return summed

    def _losses(self, predicted: Any, scores: Any) -> Any:
        """The loss of each pair; tensors give a tensor, arrays an array."""
        if not self.embeds:
            return (predicted - scores) ** 2
        scaled = self._scaled(scores)
        if self.options.objective == "cosine":
            return (predicted - scaled) ** 2
        distance, alike = 1 - predicted, scaled >= ALIKE
        return 0.5 * (alike * distance**2 + ~alike * (MARGIN - distance).clip(min=0) ** 2)

    def score(self, logits: torch.Tensor, batch: Batch) -> dict[str, Array]:
        said, scores = logits.detach().double().cpu().numpy(), batch.labels.astype(np.float64)
        return {"score": scores, "said": said, "loss_sum": self._losses(said, scores)}

    def metrics(self, row_scores: Mapping[str, Array]) -> dict[str, float]:
        """scipy's correlations (left out where one side is constant) and the mean loss."""
        from scipy.stats import pearsonr, spearmanr

        score, predicted = row_scores["score"], row_scores["said"]
        values = {"loss": float(row_scores["loss_sum"].mean())}
        if not self.embeds:
            values["mse"] = float(((score - predicted) ** 2).mean())
        if len(score) > 1 and np.ptp(score) > 0 and np.ptp(predicted) > 0:
            values |= {
                "pearson": float(pearsonr(score, predicted)[0]),
                "spearman": float(spearmanr(score, predicted)[0]),
            }
        return values

    def left_out(self, metric: str) -> str | None:
        cosines = f"train.objective {self.options.objective} gives cosines, not scores; choose spearman, or loss"
        return cosines if metric == "mse" and self.embeds else None

    def draw_metrics(
        self, row_scores: Mapping[str, Array], draws: Iterable[Array], metric: str | None = None
    ) -> Iterator[dict[str, float]]:
        score, said, loss = (row_scores[name] for name in ("score", "said", "loss_sum"))
        error, (draws, same) = (score - said) ** 2, tee(draws)
        for rows, correlations in zip(draws, correlation_draws(score, said, same), strict=True):
            values = {"loss": float(loss[rows].mean()), **correlations}
            yield values if self.embeds else values | {"mse": float(error[rows].mean())}

    def guesses(self, row_scores: Mapping[str, Array], seed: int) -> dict[str, dict[str, Array]]:
        """The mean score for every pair."""
        score = row_scores["score"]
        mean = np.full(len(score), (self._scaled(score) if self.embeds else score).mean())
        return {"the mean score": {**row_scores, "said": mean, "loss_sum": self._losses(mean, score)}}


def _encode_pairs(rows: Sequence[Mapping[str, Any]], encoder: Encoder, rules: EncodeRules) -> list[EncodedRow]:
    pairs = [(row["sentence1"], row["sentence2"]) for row in rows]
    return [
        fit_pair(pair, encoding, {"score": float(row["score"])}, encoder, rules)
        for row, pair, encoding in zip(rows, pairs, encoder.encode(pairs), strict=True)
    ]


def _encode_apart(rows: Sequence[Mapping[str, Any]], encoder: Encoder, rules: EncodeRules) -> list[EncodedRow]:
    sides = []
    for name in ("sentence1", "sentence2"):
        texts = [row[name] for row in rows]
        encodings = zip(texts, encoder.encode(texts), strict=True)
        sides.append([fit_pair(text, one, {}, encoder, rules) for text, one in encodings])
    return [_join(first, second, float(row["score"])) for row, first, second in zip(rows, *sides, strict=True)]


def _join(first: EncodedRow, second: EncodedRow, score: float) -> EncodedRow:
    if not first.sequences or not second.sequences:
        return first if not first.sequences else second
    ids = [list(one.sequences[0].input_ids) for one in (first, second)]
    extra = {"score": score, "pair_start": len(ids[0])}
    return EncodedRow.whole(TokenSequence(ids[0] + ids[1], extra), first.tokens_lost + second.tokens_lost)


def _half(row: Example, side: int) -> Example:
    cut = row.extra["pair_start"]
    return Example(row.index, row.input_ids[cut:] if side else row.input_ids[:cut], {})
