"""Numbers about generated texts, row by row, from which sacreBLEU's and rouge-score's corpus metrics follow exactly.

BLEU and chrF are functions of sums of counts, ROUGE and exact match are means, so a few numbers a row are all that an
evaluation keeps. Counts and final scores are the libraries' own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainers.records import Array

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
BLEU_COUNTS, CHRF_COUNTS = 10, 18


def translation_counts(said: Sequence[str], wanted: Sequence[str], tokenize: str) -> dict[str, Array]:
    """bleu_0 ... and chrf_0 ..., the counts of each row, int64 [rows]."""
    bleu, chrf = (np.array(one._extract_corpus_statistics(list(said), [list(wanted)]), dtype=np.int64)
                  for one in (_bleu(tokenize), _chrf()))  # fmt: skip
    return {
        **{f"bleu_{place}": bleu[:, place] for place in range(BLEU_COUNTS)},
        **{f"chrf_{place}": chrf[:, place] for place in range(CHRF_COUNTS)},
    }


def translation_metrics(row_scores: Mapping[str, Array], tokenize: str) -> dict[str, float]:
    """sacreBLEU's corpus BLEU and chrF, 0 to 100."""
    found = {}
    for name, metric, count in (("bleu", _bleu(tokenize), BLEU_COUNTS), ("chrf", _chrf(), CHRF_COUNTS)):
        sums = [int(row_scores[f"{name}_{place}"].sum()) for place in range(count)]
        found[name] = float(metric._compute_score_from_stats(sums).score)
    return found


def signatures(tokenize: str) -> dict[str, str]:
    """sacreBLEU's signatures: what makes two scores comparable."""
    found = {}
    for name, metric in (("bleu", _bleu(tokenize)), ("chrf", _chrf())):
        metric.corpus_score(["a"], [["a"]])  # the number of references is known after a score only
        found[name] = str(metric.get_signature())
    return found


def overlap_scores(texts: Sequence[str], wanted: Sequence[str]) -> dict[str, Array]:
    """ROUGE F1 of each row (with stemming; Lsum splits at line ends) and exact match, 0 to 1."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    scores: list[Any] = [scorer.score(target, text) for text, target in zip(texts, wanted, strict=True)]
    rouge = {name: np.array([one[name].fmeasure for one in scores], dtype=np.float64) for name in ROUGE}
    same = [text.strip() == target.strip() for text, target in zip(texts, wanted, strict=True)]
    return {**rouge, "exact_match": np.array(same, dtype=np.float64)}


def overlap_metrics(row_scores: Mapping[str, Array]) -> dict[str, float]:
    """Means over rows."""
    return {name: float(row_scores[name].mean()) for name in (*ROUGE, "exact_match")}


def _bleu(tokenize: str) -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize=tokenize)


def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()
