"""The job of every trial is checked before any starts."""

from collections.abc import Sequence
from typing import Any

from orchestrator.planning.preflight import CheckedJob, check_job, check_run_storage
from orchestrator.sweep.points import extreme_points, first_points
from orchestrator.sweep.spec import SweepSpec, told, trial_job
from orchestrator.sweep.tpe import check_optuna
from trainers.errors import JobError


def check_trials(spec: SweepSpec, overrides: Sequence[str]) -> tuple[CheckedJob, list[dict[str, Any]]]:
    """Check the job of every trial.

    Returns:
        The first one's job, and the values of all trials that are known.

    Raises:
        JobError: with every problem, and the trial that has it where not all have.
    """
    if spec.method == "tpe":
        check_optuna()
    points = first_points(spec)
    probes = [*points, *(extreme_points(spec) if spec.method in ("tpe", "population") else ())]
    problems: dict[str, list[str]] = {}
    checked: list[CheckedJob] = []
    for point in probes:
        try:
            job = trial_job(spec, overrides, point)
            check_run_storage(job)
            checked.append(check_job(job))
        except JobError as error:
            for problem in error.problems:
                problems.setdefault(problem, []).append(told(point))
    if problems:
        raise JobError([problem if len(where) == len(probes) else f"with {where[0]}: {problem}"
                        for problem, where in problems.items()], spec.job)  # fmt: skip
    runs: dict[tuple[str, str], str] = {}
    for one, point in zip(checked, points, strict=False):
        same = runs.setdefault((one.job.identity(), one.model.digest), told(point))
        if same != told(point):
            raise JobError(f"{same} and {told(point)} are one run: what is varied changes nothing of what is trained")
    return checked[0], points
