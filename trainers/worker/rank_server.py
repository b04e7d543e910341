"""A process that imports torch, DeepSpeed and transformers once and then becomes, or forks, ranks at once.

A node agent starts it (`python -m trainers.worker fork|become`), sees `{"ready": true}` on its standard
output, and writes one `RankSpec` a line to its standard input. `fork`: every rank is a fork, so a restart costs no
import; sound because nothing but imports has happened here: no thread, no CUDA context, no process group. `become`:
this process itself turns into the one rank, for machines with GPUs, whose driver does not survive a fork; the node
agent holds a spare one ready. When the node agent ends, standard input closes and everything here ends. Answers are
`{"pid": ..., "files": ...}` for a new rank and `{"exit": pid, "code": ..., "max_rss_bytes": ...}` for one that ended.
"""

import ctypes
import faulthandler
import gc
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from trainers.errors import TuneyardError, may_pass, to_record
from trainers.model.engine import import_deepspeed
from trainers.run.events import FailedEvent, RefusedEvent
from trainers.run.record import Run
from trainers.worker.heartbeat import HeartbeatPage
from trainers.worker.rank import run_rank
from trainers.worker.rank_spec import Mode, RankSpec, events_file, heartbeat_file, stacks_file
from trainers.worker.stop_signal import PipeHooks, StopSignal

PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15
FAILED = 1
"""Exit code of a rank that raised; the event `failed` says what."""


def main(mode: Mode) -> None:
    """Import, say so, then serve rank specs until standard input closes."""
    _import_ahead()
    signal.signal(signal.SIGCHLD, _reap)
    _say({"ready": True})
    for line in sys.stdin:
        spec = RankSpec.model_validate_json(line)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # its birth is told before its end
        pid = os.fork() if mode == "fork" else os.getpid()
        if pid:
            _say({"pid": pid, "files": spec.files})
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        if pid in (0, os.getpid()):
            _run_forever(spec)


def _import_ahead() -> None:
    """What a rank imports, also late and inside functions: most of the time to the first step, of which searches for
    cycles among what is made meanwhile were a fifth."""
    gc.disable()
    import_deepspeed()
    import deepspeed.module_inject.auto_ep_layer
    import deepspeed.ops.op_builder.all_ops
    import deepspeed.runtime.superoffload.superoffload_stage3  # noqa: F401
    import pandas  # noqa: F401 - pyarrow does when it takes an array
    import torch._dynamo
    import torch.distributed.tensor
    import torch.utils.tensorboard  # noqa: F401
    import transformers.integrations.deepspeed
    import transformers.modeling_utils
    import transformers.models.auto.modeling_auto
    import transformers.models.auto.tokenization_auto  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import trainers.tasks  # noqa: F401

    get_checkpoint_conversion_mapping("")  # makes that of every family: 0.1 s
    gc.freeze()  # 800,000 objects: DeepSpeed's gc.collect() would look through them, 0.4 s for each engine it builds
    gc.enable()


def _say(message: dict[str, Any]) -> None:
    """One line, in one write, so that it may be said from a signal handler too."""
    os.write(1, json.dumps(message).encode() + b"\n")


def _reap(*_: Any) -> None:
    """Say how every child ended that did since the last call."""
    while True:
        try:
            child, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if child == 0:
            return
        code = os.waitstatus_to_exitcode(status)
        _say({"exit": child, "code": code, "max_rss_bytes": usage.ru_maxrss * 1024})


def _run_forever(spec: RankSpec) -> NoReturn:
    """Be a rank to the end; never returns."""
    files = Path(spec.files)
    heartbeat = HeartbeatPage(heartbeat_file(files))
    stop = StopSignal(spec.run.job.checkpoint.grace_s, heartbeat)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(PR_SET_NAME, f"rank-{spec.environment['RANK']}".encode())  # what ps and top show
    _redirect(spec.log)
    os.environ.update(spec.environment)
    events = events_file(files).open("w", encoding="utf-8")
    stacks = stacks_file(files).open("w")
    faulthandler.enable()  # a crash leaves its Python stack in the log
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
    hooks = PipeHooks(events, heartbeat, stop)
    code = _run(spec.run, hooks)
    sys.stdout.flush()
    sys.stderr.flush()
    events.close()
    os._exit(code)  # gloo's threads would keep a rank whose peer is gone


def _redirect(log: str | None) -> None:
    """Standard input from nowhere; standard output, which was the line to the node agent, and error to the log."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if log is not None:
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 2)
    os.dup2(2, 1)


def _run(run: Run, hooks: PipeHooks) -> int:
    try:
        run_rank(run, hooks)
    except BaseException as error:
        if isinstance(error, TuneyardError) and not may_pass(error):
            hooks.emit(RefusedEvent(error=to_record(error), rank=int(os.environ.get("RANK", 0))))
            return error.exit_code
        traceback.print_exc()
        frames = traceback.extract_tb(error.__traceback__)
        where = f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
        number = getattr(error, "errno", None)
        hooks.emit(FailedEvent(error=to_record(error), errno=number, where=where, may_pass=may_pass(error)))
        return FAILED
    return 0
