"""Selection: whatever is committed, evaluated, killed and deleted when, only a measured checkpoint wins."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.checkpoint.retention import deletable
from trainers.errors import EvaluationError
from trainers.evaluation.selection import BASELINE, find_best, next_evaluations, out_of_patience, select
from trainers.run.folder import Evaluation
from trainers.tasks import Mode

NAN, INF = math.nan, math.inf


def measured(step: int, value: float | None) -> Evaluation:
    metrics = {} if value is None else {"f1": value, "loss": 1.0}
    return Evaluation(step=step, status="done", metrics=metrics, eval_key="e")


def failed(step: int) -> Evaluation:
    return Evaluation(step=step, status="failed", error="it died", eval_key="e")


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("odd", [NAN, INF, -INF])
def test_a_value_that_is_not_finite_is_never_best(mode: Mode, odd: float) -> None:
    records = [measured(10, odd), measured(20, 0.5), measured(30, odd)]
    assert select(records, "f1", mode).step == 20
    with pytest.raises(EvaluationError, match=f"step 10: its f1 is {odd}"):
        select([measured(10, odd), failed(20)], "f1", mode)


def test_a_value_that_is_not_finite_never_uses_up_patience() -> None:
    records = [measured(10, 0.5), measured(20, NAN), measured(30, NAN), failed(40)]
    assert not out_of_patience(records, "f1", "max", 2)
    assert not out_of_patience([measured(10, NAN), measured(20, NAN)], "f1", "max", 1)
    assert out_of_patience([*records, measured(50, 0.4), measured(60, 0.3)], "f1", "max", 2)


def guarded(step: int, value: float, **margins: float) -> Evaluation:
    return measured(step, value).model_copy(update={"guards": margins})


def test_a_checkpoint_that_misses_a_guard_is_never_best_and_says_by_how_much() -> None:
    records = [guarded(10, 0.9, loss=-0.25), guarded(20, 0.5, loss=0.0), guarded(30, 0.6, other=NAN)]
    assert select(records, "f1", "max").step == 20
    with pytest.raises(EvaluationError, match=r"its loss 1 misses the guard by 0.25.*step 30: it has no other"):
        select(records[::2], "f1", "max")


def test_a_checkpoint_that_misses_a_guard_uses_up_patience() -> None:
    records = [guarded(10, 0.5, loss=1.0), guarded(20, 0.9, loss=-1.0), guarded(30, 0.9, loss=-1.0)]
    assert out_of_patience(records, "f1", "max", 2) and not out_of_patience(records, "f1", "max", 3)


OPERATIONS = ("commit", "start", "end", "fail", "kill", "quarantine", "prune", "baseline")
VALUES = (NAN, INF, -INF, None, 0.0, 0.25, 0.5, 1.0)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, database=None)
@given(st.binary(max_size=24), st.sampled_from(["max", "min"]), st.integers(1, 3))
def test_no_schedule_selects_what_was_not_measured(schedule: bytes, mode: Mode, keep: int) -> None:
    """A byte is an operation and, where an evaluation ends by it, its value."""
    committed: set[int] = set()
    records: dict[int, Evaluation] = {}
    running: list[int] = []
    latest = 0
    for byte in schedule:
        operation, value = OPERATIONS[byte & 7], VALUES[byte >> 3 & 7]
        if operation == "commit":
            latest += 1
            committed.add(latest)
        elif operation == "start":
            chosen = next_evaluations(committed, records, running, 1)
            assert set(chosen) <= committed - set(records) - set(running)
            running += chosen
        elif operation in ("end", "fail") and running:
            step = running.pop(0)
            records[step] = failed(step) if operation == "fail" else measured(step, value)
        elif operation == "kill":  # the controller: evaluations in flight are forgotten, failed ones are done again
            running.clear()
            records = {step: record for step, record in records.items() if record.status == "done"}
        elif operation == "quarantine" and committed:
            committed.discard(max(committed))
        elif operation == "baseline":
            records[BASELINE] = measured(BASELINE, 1.0 if mode == "max" else 0.0)
        best = find_best(list(records.values()), "f1", mode)
        if operation == "prune":
            gone = set(deletable(committed, keep, {*running, *({best.step} if best else ())}))
            assert not gone & ({*running, *sorted(committed)[-keep:]} | ({best.step} if best else set()))
            committed -= gone
        finite = {
            step: record.metrics["f1"]
            for step, record in records.items()
            if step != BASELINE and record.status == "done" and math.isfinite(record.metrics.get("f1", NAN))
        }
        assert (best is None) == (not finite)
        if best is not None:
            extreme = max if mode == "max" else min
            assert finite[best.step] == extreme(finite.values())
            assert best.step == min(step for step, found in finite.items() if found == finite[best.step])
