"""Whether a quantized model is kept. Begin at `judge`, which is pure.

It is no better than the model it was made of, so the question is how much was lost: it is kept where the 95 % interval
of the paired bootstrap over the run's evaluation rows rules out a loss above the allowance (a test of non-inferiority).
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np

from trainers.errors import EvaluationError
from trainers.evaluation.bootstrap import CONFIDENCE, RESAMPLES, compare
from trainers.records import Array, Record
from trainers.tasks import Task


class Judged(Record):
    """The numbers of a verdict."""

    kept: bool
    reason: str
    quantized: float | None
    """The metric's value; None where it is undefined, as that of logits that are no numbers."""
    unquantized: float
    difference: float | None
    low: float | None
    high: float | None
    """The interval of quantized minus unquantized."""
    allowance: float
    """How much worse it may be, in the metric's own unit."""


class Verdict(Judged):
    """quantization.json beside a quantized model: how it was judged."""

    schema_version: int = 1
    form: str
    metric: str
    better: Literal["max", "min"]
    rows: int
    resamples: int
    seed: int
    eval_key: str
    model: str
    """The unquantized folder that it was made of."""
    bytes: int
    unquantized_bytes: int
    """Of the weight files."""
    notes: list[str] = []


def judge(
    quantized: Mapping[str, Array],
    unquantized: Mapping[str, Array],
    task: Task,
    metric: str,
    mode: Literal["max", "min"],
    share: float,
    seed: int,
    resamples: int = RESAMPLES,
) -> Judged:
    """Weigh a quantized model against the one it was made of.

    Args:
        quantized: per-row numbers of `Task.score`, each [rows].
        unquantized: the same over the same rows in the same order.
        share: of the unquantized value that may be lost.

    Raises:
        EvaluationError: where the unquantized model's metric is undefined, so there is nothing to compare with.
    """
    before, after = task.metric_value(metric, unquantized), task.metric_value(metric, quantized)
    if not np.isfinite(before):
        raise EvaluationError(f"{metric} of the unquantized model is {before}: nothing can be judged by it")
    allowance = share * abs(before)
    numbers = {"unquantized": before, "allowance": allowance}
    if not np.isfinite(after):
        reason = f"refused: {metric} is {after}, before {before:.6g}"
        return Judged(kept=False, reason=reason, quantized=None, difference=None, low=None, high=None, **numbers)
    found = compare(quantized, unquantized, task, metric, seed, resamples)
    worst = 0.0 - found.low if mode == "max" else found.high
    kept = bool(worst <= allowance)  # False for an interval that is undefined
    defined = bool(np.isfinite(worst))
    reason = (
        f"{'kept' if kept else 'refused'}: {metric} {after:.6g}, before {before:.6g}; difference "
        f"{found.difference:+.4g}, {CONFIDENCE:.0%} interval [{found.low:+.4g}, {found.high:+.4g}], "
        + (f"a loss of {max(worst, 0.0):.4g} cannot be ruled out" if defined else "which no draw defines")
        + f", {allowance:.4g} is allowed"
    )
    low, high = (found.low, found.high) if defined else (None, None)
    return Judged(kept=kept, reason=reason, quantized=after, difference=found.difference, low=low, high=high, **numbers)
