"""`tuneyard submit`: send a job to a running Ray cluster through Ray Jobs and follow it to its end.

The job file is checked here, before anything is sent. The cluster gets the resolved job and exactly this code (as
py_modules), never this machine's environment but for the few variables below. Data, model and storage paths must exist
on the cluster. Knows nothing of what `tuneyard run` does there.
"""

import asyncio
import contextlib
import logging
import math
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, MutableMapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from trainers.errors import PlacementError, Preempted, TrainingError
from trainers.job.load import load_job
from trainers.job.schema import Job

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

CODE = ("orchestrator", "trainers", "ds_configs")
"""Packages sent along, so that the cluster runs this version."""
PASSED_ON = ("HF_HUB_OFFLINE",)
"""Environment variables that go with the job. Tokens never do: they are set on the cluster."""
UPLOADS = ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging")
"""Loggers of Ray that tell of every package; they set their own level, so each is named."""
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
END_S = 30
"""What the driver itself may take to end, after its ranks have committed."""
JOB_FILE = "job.yaml"
START = Path(__file__).parent / "start.sh"
"""Shell that finds the interpreter of the cluster's Ray."""
INTERRUPTED = 130
AGENT_WAIT_S = 60.0
"""How long a head that has just started may have nobody to take a job."""
LOST_AFTER_S = 60.0
"""Silence of the head after which following is given up."""


def submit(job_path: Path, overrides: list[str], address: str, detach: bool = False) -> int:
    """Check a job, send it, print its logs as they come.

    Args:
        job_path: the job file.
        overrides: `section.key=value`, as for `tuneyard run`.
        address: of the cluster's dashboard, e.g. http://head:8265.
        detach: leave it there once it is sent.

    Returns:
        The exit code of the job, 0 where it was left there; 130 where the user stopped following.

    Raises:
        JobError: the job file is wrong; nothing was sent.
        PlacementError: the address does not answer, or stopped answering.
    """
    job = load_job(job_path, overrides)
    client = connect(address)
    submission_id = send(client, job)
    print(f"submitted {job.name} to {address} as {submission_id}", flush=True)
    if detach:
        print(_hint(submission_id, address), flush=True)
        return 0
    return follow(client, submission_id, address)


def connect(address: str) -> "JobSubmissionClient":
    """A client of the cluster's job server. Raises PlacementError where it does not answer or lets nobody in."""
    use_token(os.environ, Path.home())
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in UPLOADS:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise PlacementError(
            f"the Ray cluster at {address} wants its token ({str(error).splitlines()[0]}): copy ~/.ray/auth_token "
            "from its head, or set RAY_AUTH_TOKEN, and RAY_AUTH_MODE=token"
        ) from error
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PlacementError(
            f"no Ray job server answers at {address} ({cause}): give the address of the head's dashboard, "
            "usually http://HEAD:8265; the head needs ray[default]"
        ) from error


def use_token(environment: MutableMapping[str, str], home: Path) -> None:
    """Turn Ray's token authentication on where a token is at hand, by the rule that `ray start` has for itself.

    Without this the Jobs client refuses to send the token that a head started beside the same token file demands.
    """
    at_hand = (
        environment.get("RAY_AUTH_TOKEN")
        or environment.get("RAY_AUTH_TOKEN_PATH")
        or (home / ".ray" / "auth_token").is_file()
    )
    if at_hand:
        environment.setdefault("RAY_AUTH_MODE", "token")


def send(client: "JobSubmissionClient", job: Job, arguments: str = f"-m orchestrator run {JOB_FILE}") -> str:
    """Upload the resolved job and this code, and start it. Returns the submission id.

    Args:
        client: of the cluster.
        job: as `load_job` gives it, its paths absolute.
        arguments: of the interpreter on the cluster.
    """
    submission_id = f"tuneyard-{job.name}-{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory(prefix="tuneyard-submit-") as folder:
        text = yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        Path(folder, JOB_FILE).write_text(text, encoding="utf-8")
        shutil.copy(START, folder)
        with lost("take the job"):
            _submit(
                client,
                entrypoint=f"exec sh {START.name} {arguments}",
                submission_id=submission_id,
                runtime_env=runtime_env(Path(folder), os.environ, job.checkpoint.grace_s),
                metadata={"job": job.name, "task": job.task},
            )
    return submission_id


def _submit(client: "JobSubmissionClient", **job: Any) -> None:
    """Hand a job over; a head that has just started has nobody yet to take it."""
    deadline = time.monotonic() + AGENT_WAIT_S
    while True:
        try:
            client.submit_job(**job)
            return
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(1.0)


def runtime_env(working_dir: Path, environment: Mapping[str, str], grace_s: float) -> dict[str, Any]:
    """What Ray sets up for the job: its folder, this code, a few variables.

    Args:
        grace_s: seconds that the job needs to commit when it is stopped; Ray alone would kill it after 3.
    """
    variables = {name: environment[name] for name in PASSED_ON if name in environment}
    return {
        "working_dir": str(working_dir),
        "py_modules": [_package_folder(name) for name in CODE],
        "env_vars": {**variables, STOP_WAIT: str(math.ceil(grace_s) + END_S)},
        "excludes": ["__pycache__/"],
    }


def _package_folder(name: str) -> str:
    spec = find_spec(name)
    assert spec is not None and spec.submodule_search_locations, f"{name} is part of this program"
    return str(Path(next(iter(spec.submodule_search_locations))).resolve())


def follow(client: "JobSubmissionClient", submission_id: str, address: str = "ADDRESS") -> int:
    """Print the logs of a job until it ends; Ctrl-C lets it go on alone.

    Returns:
        The exit code of the job's driver (75 where it was stopped, 5 where it has none); 130 after Ctrl-C.

    Raises:
        PlacementError: where the head stops answering; the job may still be running.
    """
    try:
        asyncio.run(_print_logs(client, submission_id))
        return _exit_code(client, submission_id)
    except KeyboardInterrupt:
        print(f"\nno longer following; {submission_id} goes on.\n{_hint(submission_id, address)}",
              file=sys.stderr, flush=True)  # fmt: skip
        return INTERRUPTED


def _hint(submission_id: str, address: str) -> str:
    where = f"{submission_id} --address {address}"
    return f"  follow: tuneyard jobs logs -f {where}\n  stop:   tuneyard jobs stop {where}"


@contextlib.contextmanager
def lost(what: str) -> Iterator[None]:
    """Within, a head that does not answer, or refuses, is a PlacementError."""
    try:
        yield
    except (ConnectionError, RuntimeError, OSError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PlacementError(f"the Ray cluster does not {what}: {cause}") from error


async def _print_logs(client: "JobSubmissionClient", submission_id: str) -> None:
    """Print as lines come; a connection that broke is taken up where it stopped, for the server sends all again."""
    from aiohttp import ClientError

    printed, heard = 0, time.monotonic()
    while True:
        received = 0
        with contextlib.suppress(RuntimeError, OSError, asyncio.TimeoutError, ClientError):
            async for text in client.tail_job_logs(submission_id):
                fresh = text[max(0, printed - received) :]
                received += len(text)
                printed, heard = max(printed, received), time.monotonic()
                print(fresh, end="", flush=True)
        with contextlib.suppress(RuntimeError, OSError):
            if client.get_job_status(submission_id).is_terminal():  # the tail may have broken before the last lines
                print(client.get_job_logs(submission_id)[printed:], end="", flush=True)
                return
            heard = time.monotonic()
        if time.monotonic() - heard > LOST_AFTER_S:
            raise PlacementError(
                f"the head has not answered for {LOST_AFTER_S:.0f} s; {submission_id} may still be running. "
                "Check the address; resubmitting the same job goes on from its last checkpoint"
            )
        await asyncio.sleep(1)


def _exit_code(client: "JobSubmissionClient", submission_id: str) -> int:
    info = client.get_job_info(submission_id)
    code = info.driver_exit_code
    if code is not None and code >= 0:
        return int(code)
    message = (info.message or "").strip().splitlines()
    print(f"{submission_id}: {info.status}{': ' + message[0] if message else ''}", file=sys.stderr, flush=True)
    if str(info.status) == "SUCCEEDED":
        return 0
    return Preempted.exit_code if str(info.status) == "STOPPED" else TrainingError.exit_code
