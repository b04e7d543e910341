"""Evaluations, ledger and classes as tables, for terminal and report alike. Pure: records and arrays in, tables out."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from orchestrator.report.table import Measure, Table
from trainers.evaluation.confusion import count_pairs
from trainers.evaluation.selection import why_not
from trainers.records import Array
from trainers.run.events import Event, ProfileEvent
from trainers.run.folder import Evaluation
from trainers.shards.manifest import ShardManifest
from trainers.tasks import SET

MOST_CLASSES = 25
"""A larger confusion matrix cannot be read on a page; the most frequent confusions are listed instead."""
MOST_CONFUSIONS = 25
NOTHING: Mapping[str, Any] = MappingProxyType({})


def evaluation_table(
    evaluations: Sequence[Evaluation],
    metric: str | None,
    best_step: int | None,
    most: int | None = None,
    baselines: Mapping[str, Mapping[str, float]] = NOTHING,
) -> Table:
    """Metrics by step with their intervals, the deciding one first, then the guards; failures stand among them with
    their reason. Below them answers that need no reading.

    Args:
        metric: the one that decides.
        best_step: marked.
        most: number of metrics shown, without rows and seconds; default all but those by class, with both.
        baselines: as `RunResult` has them.
    """
    names = {name for evaluation in evaluations for name in evaluation.metrics if "/" not in name or name == metric}
    guards = {name for evaluation in evaluations for name in evaluation.guards}
    shown = sorted(names | guards, key=lambda name: (name != metric, name not in guards, name))[:most]
    rows, kinds = [], []
    for evaluation in sorted(evaluations, key=lambda each: each.step):
        reason = why_not(evaluation, metric) if metric else evaluation.error
        kind = "failure" if evaluation.status == "failed" else "best" if evaluation.step == best_step else ""
        state = reason or kind or ("" if evaluation.step else "pretrained baseline")
        effort = () if most else (evaluation.rows, f"{evaluation.seconds:.1f}")
        rows.append((evaluation.step, *(_measure(evaluation, name) for name in shown), *effort, state))
        kinds.append(kind)
    for name, values in baselines.items():
        known = {metric: value for metric, value in values.items() if not math.isnan(value)}
        rows.append((name, *map(known.get, shown), *(() if most else (None, None)), ""))
        kinds.append("")
    title = f"evaluations, by {metric}"
    if any(evaluation.intervals for evaluation in evaluations):
        title += "; below each value its 95 % interval"
    return Table(title, ("step", *shown, *(() if most else ("rows", "seconds")), ""), rows, kinds)


def _measure(evaluation: Evaluation, name: str) -> Measure:
    return Measure(evaluation.metrics.get(name), evaluation.intervals.get(name))


def ledger_table(splits: Sequence[ShardManifest]) -> Table:
    """Every input row by what became of it; a column a split."""
    outcomes = sorted({name for split in splits for name in split.outcomes})
    rows: list[tuple[Any, ...]] = [("rows in", *(split.rows_in for split in splits))]
    for name in outcomes:
        counts = [(split.outcomes.get(name, 0), max(split.rows_in, 1)) for split in splits]
        rows.append((name, *(f"{count:,} ({count / rows_in:.2%})" for count, rows_in in counts)))
    totals = (("sequences", "rows"), ("tokens", "tokens"), ("target tokens", "targets"), ("tokens lost", "tokens_lost"))
    rows += [(title, *(split.total(field) for split in splits)) for title, field in totals]
    rows.append(("shards", *(split.key for split in splits)))
    return Table("ledger: every input row", ("", *(split.split for split in splits)), rows)


def profile_table(events: Sequence[Event]) -> Table | None:
    """What took the time of the steps that were profiled last; None where none were."""
    told = [event for event in events if isinstance(event, ProfileEvent)]
    if not told:
        return None
    last = told[-1]
    rows: list[tuple[Any, ...]] = [("a step", f"{last.step_s * 1e3:,.1f}", "100 %", None)]
    if last.busy_s is not None:
        rows.append(("the GPU computes", f"{last.busy_s * 1e3:,.1f}", f"{last.busy_s / last.step_s:.0%}", None))
        rows.append(("waits for the GPU", None, None, last.waits))
    rows += [
        (name, f"{seconds * 1e3:,.1f}", f"{seconds / last.step_s:.0%}", calls)
        for name, seconds, calls in last.operators
    ]
    use = "" if last.mfu is None else f", {last.mfu:.1%} of the GPUs' peak"
    title = f"profile up to step {last.step}: {last.tokens_per_s:,.0f} tokens/s{use}; trace: {last.trace}"
    return Table(title, ("", "milliseconds a step", "share", "calls a step"), rows)


def table_by_class(evaluation: Evaluation, sets: Sequence[str] = ()) -> Table | None:
    """Metrics by class, label or entity type of the deciding set, KIND/NAME, with their intervals; None without any.

    Args:
        sets: names of the other evaluation sets.
    """
    own = [name for name in evaluation.metrics
           if "/" in name and not name.endswith(tuple(f"{SET}{one}" for one in sets))]  # fmt: skip
    kinds = list(dict.fromkeys(name.partition("/")[0] for name in own))
    names = sorted({name.partition("/")[2] for name in own})
    rows = [(name, *(_measure(evaluation, f"{kind}/{name}") for kind in kinds)) for name in names]
    return Table("classes", ("class", *kinds), rows) if rows else None


def class_table(counts: Array, names: Sequence[str], intervals: Mapping[str, tuple[float, float]] = NOTHING) -> Table:
    """Precision, recall and F1 of each class; 0 where they are not defined.

    Args:
        counts: int [true, predicted].
        names: of the classes.
        intervals: of an evaluation.
    """
    hits, predicted, true = np.diag(counts), counts.sum(0), counts.sum(1)
    scores = (hits / np.maximum(predicted, 1), hits / np.maximum(true, 1), 2 * hits / np.maximum(predicted + true, 1))
    kinds = ("precision", "recall", "f1")
    rows = [
        (name, *(Measure(float(score[at]), intervals.get(f"{kind}/{name}"))
                 for kind, score in zip(kinds, scores, strict=True)), int(true[at]))
        for at, name in enumerate(names)
    ]  # fmt: skip
    return Table("classes", ("class", "precision", "recall", "F1", "rows"), rows)


def confusion_table(counts: Array, names: Sequence[str]) -> Table:
    """The most frequent confusions."""
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_CONFUSIONS]
    pairs = [divmod(int(index), len(names)) for index in order]
    rows = [(names[true], names[guess], int(wrong[true, guess])) for true, guess in pairs if wrong[true, guess]]
    return Table("most frequent confusions", ("true", "predicted", "rows"), rows)


def classes(
    label: Array, prediction: Array, names: Sequence[str], intervals: Mapping[str, tuple[float, float]] = NOTHING
) -> dict[str, Any]:
    """What the page shows of a classification: a table by class, and the confusion matrix or the worst of it.

    Args:
        label: int [rows], the true class.
        prediction: int [rows], the predicted one.
        names: of the classes; a class without a name shows its number.
        intervals: of the evaluation.
    """
    size = max(len(names), int(label.max()) + 1, int(prediction.max()) + 1)
    names = [*names, *map(str, range(len(names), size))]
    counts = count_pairs(label, prediction, size)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    small = size <= MOST_CLASSES
    return {
        "table": class_table(counts, names, intervals),
        "names": names,
        "counts": counts.tolist() if small else None,
        "shares": shares.round(3).tolist(),
        "confusions": None if small else confusion_table(counts, names),
    }


def time_table(seconds: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """What took time, how much, and its share of the longest in percent."""
    longest = max(seconds.values(), default=0.0) or 1.0
    return [
        (name.replace("_", " "), f"{value:.1f} s", round(100 * value / longest, 1))
        for name, value in seconds.items()
        if value >= 0.05
    ]
