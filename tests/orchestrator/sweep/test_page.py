"""Heights on the axes of parallel coordinates, and the table of trials."""

from orchestrator.sweep.page import draw_parallel, scale, trial_table
from orchestrator.sweep.record import SweepRecord, Trial


def test_numbers_of_several_magnitudes_stand_on_a_logarithmic_axis_and_others_in_proportion() -> None:
    ticks, heights = scale([1e-5, 1e-4, 1e-3])
    assert [round(height, 9) for height in heights] == [0, 0.5, 1]
    assert [name for name, _ in ticks] == ["1e-05", "0.0001", "0.001"]
    assert scale([1.0, 2.0, 5.0])[1] == [0, 0.25, 1]
    assert scale([0.0, 30.0, 40.0])[1] == [0, 0.75, 1], "no logarithm of 0"
    assert scale([3, 3])[1] == [0.5, 0.5]
    assert len(scale(list(range(50)))[0]) == 2


def test_words_and_switches_stand_in_order() -> None:
    assert scale(["linear", "cosine", "linear"]) == ([("cosine", 0.0), ("linear", 1.0)], [1.0, 0.0, 1.0])
    assert scale([True, False])[1] == [1.0, 0.0]


def test_trials_are_ranked_and_failures_say_why() -> None:
    def trial(number: int, *curve: tuple[int, float], **more: object) -> Trial:
        return Trial(number=number, values={"a.b": number}, run="r", steps=8, step=8, curve=curve, **more)

    trials = (trial(1, state="failed", error="loss is nan\nmore"), trial(2, (4, 0.9), (8, 0.5)), trial(3, (8, 0.4)))
    record = SweepRecord(
        job="j", fields=("a.b",), method="grid", halving=None, metric="loss", mode="min", trials=trials, best=3
    )
    table = trial_table(record)
    assert trial_table(record, 9).rows[2][-1] == "failed: loss ..."
    assert [(row[0], row[-1]) for row in table.rows] == [(3, "best"), (2, "waiting"), (1, "failed: loss is nan")]
    assert [row[2] for row in table.rows] == [0.4, 0.5, None]
    assert list(table.kinds) == ["best", "", "failure"]
    assert "trial 3 a.b=3 loss 0.4; trial 2 a.b=2 loss 0.5" in draw_parallel(record)
