"""A row's conversation as it waits for its last answer. Begin at `await_answer`."""

from collections.abc import Mapping
from typing import Any

from trainers.tasks.chat.calls import NotAConversation
from trainers.tasks.chat.conversations import TRAINED, find_messages, role_of

FILLER = "-"
"""Stands for the answer, so that the row is encoded as for training; it is cut off again."""
ANSWERS = (("prompt", "completion"), ("instruction", "output"))
"""A column that asks, and the one that answers it."""
NOT_ASKED = frozenset((*TRAINED, "train_detail"))
"""Names of what says which messages are trained: nothing to one who asks."""


def await_answer(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row as messages of which the last, the assistant's, is only a filler: in place of the row's own answer if the
    assistant speaks last, else behind the others. A row that is no conversation stays as it is.
    """
    empty = {said: FILLER for asked, said in ANSWERS if row.get(asked) is not None and row.get(said) is None}
    filled = {**row, **empty}
    try:
        messages = find_messages(filled)
    except NotAConversation:
        return filled  # which `read_chat` refuses for the same reason
    if not messages:
        return row
    before = messages[:-1] if role_of(messages[-1]) == "assistant" else messages
    asked = [{key: value for key, value in message.items() if key not in NOT_ASKED} for message in before]
    offered = {name: row[name] for name in ("tools", "functions") if name in row}
    return {"messages": [*asked, {"role": "assistant", "content": FILLER}], **offered}
