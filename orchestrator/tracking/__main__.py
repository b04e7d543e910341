"""`python -m orchestrator.tracking`: follows the run that comes as the first line of stdin, until stdin ends."""

import os
import signal
import sys

from orchestrator.tracking.outlets import follow
from trainers.run.record import Run


def main() -> None:
    """Signals to the driver's group or session are not meant for this process, which ends with the driver."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(5)
    run = Run.model_validate_json(sys.stdin.buffer.readline())
    follow(run, sys.stdin.buffer)


if __name__ == "__main__":
    main()
