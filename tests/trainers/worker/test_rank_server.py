"""What a rank's process is like once everything is imported."""

import subprocess
import sys

import pytest

LOOK = """
import gc, sys
from trainers.worker import rank_server
rank_server._import_ahead()
print(gc.isenabled(), gc.get_freeze_count(), {"torch._inductor.compile_fx", "mlflow"} & {*sys.modules})
"""


@pytest.mark.slow
def test_what_is_imported_is_no_garbage_and_nothing_unneeded_and_what_comes_later_is_searched() -> None:
    told = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, timeout=300, check=True).stdout
    searched, frozen, unneeded = told.splitlines()[-1].split()
    assert searched == "True" and int(frozen) > 300_000 and unneeded == "set()"
