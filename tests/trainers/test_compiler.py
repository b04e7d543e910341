"""What Triton needs of a machine, and that torch does without it where it is missing."""

import sys
import sysconfig
import types
from pathlib import Path

import pytest

from trainers import compiler
from trainers.compiler import compiler_problem, has_triton


@pytest.fixture
def headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of Python's headers, and a compiler beside it."""
    (tmp_path / "Python.h").touch()
    (tmp_path / "gcc").touch(mode=0o755)
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path


def test_a_compiler_and_pythons_headers_are_all_it_takes(headers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler_problem() is None
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "a C compiler" in (compiler_problem() or "")
    monkeypatch.setenv("CC", str(headers / "gcc"))
    assert compiler_problem() is None
    (headers / "Python.h").unlink()
    assert "Python.h" in (compiler_problem() or "") and "C compiler" not in (compiler_problem() or "")


@pytest.mark.parametrize("complete", [True, False])
def test_torch_does_without_triton_where_its_stubs_cannot_be_built(
    headers: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, complete: bool
) -> None:
    import torch._native.triton_utils  # torch 2.13 has it

    told: list[bool] = []
    monkeypatch.setattr(torch._native.triton_utils, "deregister_op_overrides", lambda: told.append(True))
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    monkeypatch.setattr(compiler, "find_spec", lambda _: True)
    if not complete:
        (headers / "gcc").unlink()
    has_triton.cache_clear()
    try:
        assert has_triton() is has_triton() is complete
    finally:
        has_triton.cache_clear()
    assert told == ([] if complete else [True])
    assert ("without Triton" in caplog.text) is not complete
