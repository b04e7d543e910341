"""The tables of the report as plain data. Pure: records and arrays in, texts and numbers out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainers.records import Array
from trainers.run.folder import Evaluation
from trainers.shards.manifest import Shards

MOST_CLASSES = 25
"""A confusion matrix larger than this is no use on a page; the worst confusions are listed instead."""
MOST_CONFUSIONS = 25

Table = dict[str, Any]


def number(value: object) -> str:
    """A figure with four decimals, or four digits where it is large or tiny; a dash where there is none."""
    if not isinstance(value, int | float):
        return "–"
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"


def evaluation_table(evaluations: Sequence[Evaluation], best_step: int | None) -> Table:
    """Metrics by step; failures stand among them with their reason."""
    names = sorted({name for one in evaluations for name in one.metrics if "/" not in name})
    rows = []
    for one in sorted(evaluations, key=lambda one: one.step):
        failed = one.status == "failed"
        kind = "failure" if failed else ("best" if one.step == best_step else "")
        values = [number(one.metrics.get(name)) for name in names]
        error = (one.error or "failed") if failed else None
        rows.append(
            {
                "step": one.step,
                "kind": kind,
                "values": values,
                "error": error,
                "rows": f"{one.rows:,}",
                "seconds": f"{one.seconds:.1f}",
            }
        )
    notes = {name: note for one in evaluations for name, note in one.notes.items()}
    return {"names": names, "rows": rows, "notes": sorted(notes.items())}


def class_tables(label: Array, prediction: Array, names: Sequence[str]) -> Table:
    """Precision, recall and F1 of each class, and what was taken for what.

    Args:
        label: int [rows], the true class.
        prediction: int [rows], the predicted one.
        names: of the classes; a class without a name shows its number.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    size = max(len(names), int(label.max()) + 1, int(prediction.max()) + 1)
    called = [*names, *(str(index) for index in range(len(names), size))]
    classes = range(size)
    scores = precision_recall_fscore_support(label, prediction, labels=classes, zero_division=0)
    rows = [
        {"name": name, "precision": f"{p:.3f}", "recall": f"{r:.3f}", "f1": f"{f:.3f}", "support": f"{int(s):,}"}
        for name, p, r, f, s in zip(called, *scores, strict=True)
    ]
    counts = confusion_matrix(label, prediction, labels=classes)
    small = size <= MOST_CLASSES
    return {
        "names": called,
        "rows": rows,
        "matrix": _matrix(counts, called) if small else None,
        "confusions": [] if small else _confusions(counts, called),
    }


def _matrix(counts: Array, names: Sequence[str]) -> list[Table]:
    totals = np.maximum(counts.sum(axis=1), 1)
    return [
        {
            "name": name,
            "cells": [
                {
                    "count": int(count),
                    "share": f"{count / totals[true]:.3f}",
                    "kind": "right" if said == true else "wrong",
                }
                for said, count in enumerate(counts[true])
            ],
        }
        for true, name in enumerate(names)
    ]


def _confusions(counts: Array, names: Sequence[str]) -> list[Table]:
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_CONFUSIONS]
    pairs = [divmod(int(place), len(names)) for place in order]
    return [
        {"label": names[true], "prediction": names[said], "count": int(wrong[true, said])}
        for true, said in pairs
        if wrong[true, said]
    ]


def ledger_table(shards: Shards) -> Table:
    """Every input row by what became of it."""
    splits = {"train": shards.train, "eval": shards.eval}
    outcomes = sorted({name for manifest in splits.values() for name in manifest.outcomes})
    rows = [
        {
            "split": split,
            "counts": [f"{manifest.outcomes.get(name, 0):,}" for name in outcomes],
            "rows_in": f"{manifest.rows_in:,}",
            "sequences": f"{manifest.total('rows'):,}",
            "tokens": f"{manifest.total('tokens'):,}",
            "targets": f"{manifest.total('targets'):,}",
            "tokens_lost": f"{manifest.total('tokens_lost'):,}",
        }
        for split, manifest in splits.items()
    ]
    return {"outcomes": outcomes, "rows": rows}


def stage_table(seconds: Mapping[str, float]) -> list[Table]:
    """Wall time by stage, with its share of the longest."""
    longest = max(seconds.values(), default=0.0) or 1.0
    return [
        {"name": name, "seconds": f"{value:.1f} s", "percent": f"{100 * value / longest:.1f}"}
        for name, value in seconds.items()
    ]
