"""Shared storage as several hosts see it, on one machine: root and FUSE needed, and bindfs for the views that lag."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

LAG_S = 30


def missing_for_mounts() -> str | None:
    """Why no FUSE folder can be mounted here, or None."""
    if os.geteuid() or not Path("/dev/fuse").exists():
        return "mounting needs root and /dev/fuse"
    if not shutil.which("bindfs") or not shutil.which("fusermount3"):
        return "bindfs and fuse3 are not installed"
    try:
        import fuse  # noqa: F401
    except (ImportError, OSError) as error:  # the package, or libfuse2 that it loads
        return f"fusepy cannot be used: {error}"
    return None


@contextmanager
def lagging_views(folder: Path, count: int = 2, lag_s: float = LAG_S) -> Iterator[list[Path]]:
    """The same folder mounted several times, each of which remembers for `lag_s` what it saw or missed."""
    real = folder / "real"
    real.mkdir(parents=True)
    with ExitStack() as stack:
        views = []
        for number in range(count):
            views.append(folder / f"view-{number}")
            views[-1].mkdir()
            caches = ",".join(f"{kind}_timeout={lag_s}" for kind in ("attr", "entry", "negative"))
            subprocess.run(["bindfs", "-o", caches, str(real), str(views[-1])], check=True)
            stack.callback(_unmount, views[-1])
        yield views


@contextmanager
def failing_view(folder: Path, real: Path) -> Iterator[tuple[Path, Path]]:
    """A folder mounted again with faults; the mount and its control file, which begins with none."""
    view, control = folder / "failing", folder / "control"
    view.mkdir(parents=True)
    control.write_text("0")
    command = [sys.executable, "-m", "tests.failing_mount", str(real), str(view), str(control)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[1]) as process:
        try:
            deadline = time.monotonic() + 120
            while not view.is_mount():
                assert process.poll() is None and time.monotonic() < deadline, "the failing mount did not come up"
                time.sleep(0.02)
            yield view, control
        finally:
            try:
                _unmount(view)
                process.wait(60)
            finally:
                process.kill()  # leaving the block waits for it without end


def _unmount(view: Path) -> None:
    subprocess.run(["umount", "--lazy", str(view)], check=True)
