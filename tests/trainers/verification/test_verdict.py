"""What is said where self-tests did not pass: a test that broke is no finding, and the remedy fits what failed."""

from pathlib import Path

import pytest

from tests.tiny import tiny_job
from tests.trainers.tasks import small
from trainers.errors import TrainingError
from trainers.verification import checks
from trainers.verification.checks import Finding
from trainers.verification.sample import CheckContext, make_context
from trainers.verification.verdict import CheckResult, Verification, require_passed
from trainers.verification.verify import run_checks


def verdict(*results: CheckResult, packing: bool = True) -> str:
    found = Verification(key="k", task="pretrain", attention="sdpa", packing=packing, checks=results)
    with pytest.raises(TrainingError) as raised:
        require_passed(found)
    return str(raised.value)


def result(name: str, passed: bool = False, error: bool = False) -> CheckResult:
    return CheckResult(name=name, passed=passed, detail="off by 1.0", seconds=0.0, error=error)


def test_a_broken_self_test_is_named_as_that_and_explains_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(context: CheckContext) -> Finding:
        raise TypeError("can't convert cuda:0 device type tensor to numpy\nand more")

    monkeypatch.setattr(checks, "CHECKS", {"reload": broken, "target_share": checks.target_share})
    monkeypatch.setattr("trainers.verification.verify.CHECKS", checks.CHECKS)
    job = tiny_job(tmp_path / "job", small.llama(tmp_path), "pretrain", small.plain_rows(40))
    (tmp_path / "shard").mkdir()
    results = run_checks(make_context(job, job.model.path, tmp_path / "shard"))
    assert [(check.name, check.passed, check.error) for check in results] == [
        ("reload", False, True), ("target_share", True, False), ("bf16", True, False)]  # fmt: skip
    assert results[0].detail == (
        "the self-test itself failed, TypeError: can't convert cuda:0 device type tensor to numpy"
    )
    message = verdict(*results)
    assert "could not be run" in message and "the self-test itself failed" in message
    assert "packing" not in message and "model.attention" not in message


def test_the_remedy_names_packing_only_where_documents_share_a_sequence_and_that_failed() -> None:
    assert "data.packing: false" in verdict(result("isolation"))
    assert "packing" not in verdict(result("isolation"), packing=False)
    for name in ("padding", "reload", "model_agrees", "target_share", "each_row_once"):
        message = verdict(result(name), result("isolation", passed=True))
        assert "packing" not in message, name
    assert "packing" not in verdict(result("isolation", error=True), result("reload"))
