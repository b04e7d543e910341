"""The loop of `tuneyard chat`: a line in, an answer out as it is generated. Begin at `talk`."""

import sys
from collections.abc import Iterator
from contextlib import suppress

from trainers.errors import JobError
from trainers.evaluation.conversation import Conversation

RESET = "/reset"


def talk(conversation: Conversation) -> None:
    """Answer line by line until the input ends; Ctrl-C ends an answer, which is then forgotten."""
    for line in _lines():
        if line.strip() == RESET:
            conversation.reset()
        elif line.strip():
            try:
                conversation.answer(line, _write)
            except KeyboardInterrupt:
                _write(" [stopped]")
            except JobError as error:
                _write(f"{error} with {RESET}")
            _write("\n")


def _lines() -> Iterator[str]:
    """Lines of the input; in a terminal with a prompt, and with the keys of readline."""
    prompt = ""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401 - input() uses it where it is there
        print(f"{RESET} starts a new conversation, Ctrl-D ends")
        prompt = "> "
    while True:
        try:
            yield input(prompt)
        except (EOFError, KeyboardInterrupt):
            return


def _write(text: str) -> None:
    print(text, end="", flush=True)
