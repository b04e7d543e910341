"""Entity counts by row, and seqeval's metrics from their sums. Pure: tags in, numbers out.

seqeval's scores are ratios of three counts, so keeping the counts of each row keeps the scores exact under any grouping
of rows and needs no text. Plain is seqeval's default (as conlleval), strict asks for whole entities of the scheme.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainers.records import Array

MODES = ("", "strict_")
KINDS = ("true", "predicted", "right")
MOST_TYPES = 50
"""Entity types up to which each has metrics of its own."""

Entity = tuple[str, int, int]
"""type, first word, last word."""


def entity_types(labels: Sequence[str]) -> list[str]:
    """Types of a set of tags, sorted."""
    return sorted({label[2:] for label in labels if label != "O"})


def entity_counts(
    truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], labels: Sequence[str]
) -> dict[str, Array]:
    """Entities true, predicted and right of each row, by mode and type: int32 [rows] each."""
    types, scheme = entity_types(labels), _scheme(labels)
    counts = {f"{mode}{kind}:{name}": np.zeros(len(truth), dtype=np.int32)
              for mode in MODES for kind in KINDS for name in types}  # fmt: skip
    for row, (true_tags, said_tags) in enumerate(zip(truth, predicted, strict=True)):
        for mode in MODES:
            true, predicted_entities = (_entities(tags, scheme if mode else None) for tags in (true_tags, said_tags))
            for kind, entities in zip(KINDS, (true, predicted_entities, true & predicted_entities), strict=True):
                for name, count in Counter(entity[0] for entity in entities).items():
                    counts[f"{mode}{kind}:{name}"][row] = count
    return counts


def entity_metrics(row_scores: Mapping[str, Array], types: Sequence[str]) -> dict[str, float]:
    """precision, recall and f1, overall (micro) and as precision/TYPE ..., each also with the prefix strict_."""
    metrics: dict[str, float] = {}
    for mode in MODES:
        sums = {name: [int(row_scores[f"{mode}{kind}:{name}"].sum()) for kind in KINDS] for name in types}
        whole = [sum(values) for values in zip(*sums.values(), strict=True)] if sums else [0, 0, 0]
        metrics |= {f"{mode}{kind}": value for kind, value in _scores(*whole).items()}
        for name in types if len(types) <= MOST_TYPES else ():
            metrics |= {f"{mode}{kind}/{name}": value for kind, value in _scores(*sums[name]).items()}
    return metrics


def _scores(true: int, predicted: int, right: int) -> dict[str, float]:
    precision = right / predicted if predicted else 0.0
    recall = right / true if true else 0.0
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}


def _scheme(labels: Sequence[str]) -> Any:
    """seqeval's scheme for a set of tags: BIOES where any tag ends or stands alone, else BIO."""
    from seqeval.scheme import IOB2, IOBES

    return IOBES if any(label[:2] in ("E-", "S-") for label in labels) else IOB2


def _entities(tags: Sequence[str], scheme: Any) -> set[Entity]:
    from seqeval.metrics.sequence_labeling import get_entities
    from seqeval.scheme import Entities

    if scheme is None:
        return set(get_entities(list(tags)))
    found = Entities([list(tags)], scheme).entities[0]
    return {(one.tag, one.start, one.end) for one in found}
