"""One process a run folder; a file system without locks is a message."""

import errno
import fcntl
import threading
from pathlib import Path
from typing import Any

import pytest

from trainers.errors import JobError
from trainers.run.lock import own_folder
from trainers.storage import Folder


def test_a_second_owner_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "run"))
    with own_folder(folder), pytest.raises(JobError, match="another process is at work"), own_folder(folder):
        raise AssertionError("two owners")
    with own_folder(folder):
        pass


def test_an_owner_who_lets_go_in_time_is_waited_for(tmp_path: Path) -> None:
    folder, owned, let_go = Folder(str(tmp_path / "run")), threading.Event(), threading.Event()

    def own() -> None:
        with own_folder(folder):
            owned.set()
            let_go.wait()

    owner = threading.Thread(target=own)
    owner.start()
    owned.wait()
    threading.Timer(0.5, let_go.set).start()
    with own_folder(folder, wait_s=60):
        assert let_go.is_set()
    owner.join()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(JobError, match=r"storage: .* cannot be locked .*flock"), own_folder(Folder(str(tmp_path))):
        raise AssertionError("never owned")
