"""The shapes in which data sets write conversations, read as one: a list of messages with role and content.

OpenAI `messages` (tool calls and text parts included), `prompt` and `completion` (strings, or messages as TRL has
them), ShareGPT `conversations`, Alpaca `instruction`, `input`, `output` with `system` and `history`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainers.tasks.chat.calls import (
    NotAConversation,
    listed_calls,
    read_call,
    read_tools,
    said_calls,
    without_nulls,
)

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "ipython"), "tool"),
}
"""Role by the name that a data set gives it."""
REASONING = ("reasoning_content", "reasoning", "thinking", "thinking_content", "thought", "thoughts")
"""Names that a message's reasoning goes by; the first is the one handed to templates."""
UNREAD_REASONING = re.compile("reasoning|thinking|thought|^think", re.IGNORECASE)
"""What the name of a field with reasoning in another form holds, such as reasoning_details; stop_reason is none."""
OTHER_KINDS = {
    **dict.fromkeys(("chosen", "rejected"), "preference_pairs: rows hold chosen and rejected answers, sft wants one"),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "media: rows hold {}, sft reads text"),
    "chat_template_kwargs": "template_arguments: rows hold {}, which no template is given; write them into "
    "data.chat_template",
    **dict.fromkeys(("kto_tag", "label"), "preference_labels: {} says which answers are liked, sft learns each"),
}
"""What a row with one of these fields is; `label` only where it is true or false."""
TRAINED = ("train", "weight", "loss_weight", "training", "trainable")
"""Names of what says whether a message is trained: true or 1, false or 0."""
PARTS = {
    **dict.fromkeys(("reasoning", "thinking"), 0),
    **dict.fromkeys(("text", "input_text", "output_text"), 1),
    "tool_call": 2,
}
"""Types of parts that a content may have, and the order in which templates write them."""
KEPT_KEYS = ("tool_calls", "tool_call_id", "name")
SPEAKERS = ("role", "from", "speaker", "author", "sender")
"""Names of who speaks,"""
TEXTS = ("content", "value", "text", "message", "utterance")
"""and of what is said."""
READ = frozenset((*KEPT_KEYS, *SPEAKERS, *TEXTS, *REASONING, *TRAINED, "function_call", "train_detail"))
Message = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """A conversation, as templates are given it."""

    messages: list[Message]
    tools: list[Any] | None = None
    muted: frozenset[int] = frozenset()
    """Messages of the assistant that are not trained: `weight: 0` or `train: false`."""
    unread: frozenset[str] = frozenset()
    """Names of what its messages hold beside, which no template is given."""


def read_chat(row: Mapping[str, Any]) -> Chat | str:
    """The conversation of a row, or the reason why there is none."""
    try:
        raw = find_messages(row)
        messages = [_checked(message) for message in raw]
        tools = read_tools(row.get("tools") or row.get("functions"))
        muted = frozenset(index for index, message in enumerate(raw) if _is_muted(message))
        unread = frozenset(
            str(key) for message in raw if len(message) > 2 for key in message.keys() - READ if message[key]
        )
    except NotAConversation as reason:
        return str(reason)
    if not any(_speaks(message) for index, message in enumerate(messages) if index not in muted):
        return "no_target"
    return Chat(messages, tools, muted, unread)


def find_messages(row: Mapping[str, Any]) -> list[Any]:
    """The messages of a row as it has them, whatever its shape. Raises NotAConversation."""
    for field, kind in () if OTHER_KINDS.keys().isdisjoint(row) else OTHER_KINDS.items():
        if without_nulls(row.get(field)) not in (None, [], "", {}) and (
            field != "label" or isinstance(row[field], bool)
        ):
            raise NotAConversation(kind.format(field))
    if row.get("messages") is not None:
        messages = row["messages"]
    elif row.get("conversations") is not None:
        messages = row["conversations"]
    elif row.get("instruction") is not None and row.get("output") is not None:
        messages = _alpaca(row)
    elif row.get("prompt") is not None and row.get("completion") is not None:
        asked, said = row["prompt"], row["completion"]
        asked = asked if isinstance(asked, list) else [{"role": "user", "content": asked}]
        messages = [*asked, *(said if isinstance(said, list) else [_answer(row, said)])]
    else:
        raise NotAConversation("missing_messages")
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise NotAConversation("messages_not_a_list")
    return _with_system(row.get("system"), messages)


def _with_system(system: Any, messages: list[Any]) -> list[Any]:
    """With what a row's column says to begin with. Raises NotAConversation where the messages begin otherwise."""
    if not system or (isinstance(system, str) and not system.strip()):
        return messages
    if not isinstance(system, str):
        raise NotAConversation("system_not_a_string")
    if not messages or role_of(messages[0]) != "system":
        return [{"role": "system", "content": system}, *messages]
    if _checked(messages[0])["content"].strip() != system.strip():
        raise NotAConversation("system_differs_from_the_system_message")
    return messages


def _answer(row: Mapping[str, Any], text: Any) -> dict[str, Any]:
    """The assistant's turn of a row that is one, with reasoning that stands beside it."""
    return {"role": "assistant", "content": text, **{name: row[name] for name in REASONING if row.get(name)}}


def _alpaca(row: Mapping[str, Any]) -> list[Any]:
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise NotAConversation("history_not_pairs")
    instruction, extra = row["instruction"], row.get("input")
    extra = "" if extra in (None, [], {}) else extra
    if not isinstance(extra, str):
        raise NotAConversation("input_not_a_string")
    if extra.strip() and not isinstance(instruction, str):
        raise NotAConversation("content_not_a_string")
    asked = f"{instruction}\n{extra}" if extra.strip() else instruction
    roles = ("user", "assistant")
    earlier = [{"role": role, "content": text} for pair in history for role, text in zip(roles, pair, strict=True)]
    return [*earlier, {"role": "user", "content": asked}, _answer(row, row["output"])]


def role_of(message: Mapping[str, Any]) -> str | None:
    """Who says a message, as templates call it; None where the name is not known."""
    return ROLES.get(_speaker(message).strip().lower())


def _speaker(message: Mapping[str, Any]) -> str:
    """The name of who says a message, as the data have it."""
    return next((str(message[key]) for key in SPEAKERS if message.get(key)), "")


def _is_muted(message: Mapping[str, Any]) -> bool:
    """Whether a message is said not to be trained. Raises NotAConversation where it says what sft cannot do."""
    if len(message) == 2:  # a role and a content
        return False
    if message.get("train_detail"):
        raise NotAConversation("train_detail_masks_parts_of_a_message")
    marks = [message[name] for name in TRAINED if message.get(name) is not None]
    if any(mark not in (0, 1) for mark in marks):
        raise NotAConversation("message_weight_is_neither_0_nor_1")
    if marks and all(marks) and role_of(message) != "assistant":
        raise NotAConversation("a_message_that_is_not_the_assistant's_is_to_be_trained")
    return not all(marks)


def _speaks(message: Message) -> bool:
    return message["role"] == "assistant" and any(map(str.strip, _texts(message)))


def _texts(message: Message) -> tuple[str, ...]:
    return message["content"], message.get(REASONING[0], ""), "call" if message.get("tool_calls") else ""


def _checked(message: Mapping[str, Any]) -> Message:
    """A message with known role, text content and nothing that has no value. Raises NotAConversation."""
    content = message.get("content")
    if len(message) == 2 and isinstance(content, str) and message.get("role") in ("user", "assistant", "system"):
        return dict(message)
    role = role_of(message)
    if role is None:
        raise NotAConversation("unknown_role")
    clean = {key: message[key] for key in KEPT_KEYS if message.get(key)}
    content = next((message[key] for key in TEXTS if message.get(key) is not None), None)
    if _speaker(message) == "function_call":
        clean["tool_calls"], content = said_calls(content), ""
    if isinstance(old := message.get("function_call"), Mapping):  # OpenAI's form before tool calls
        clean["tool_calls"] = [{"type": "function", "function": old}]
    if "tool_calls" in clean:
        clean["tool_calls"] = [read_call(call) for call in listed_calls(clean["tool_calls"])]
    if role == "assistant":
        _keep_reasoning(message, clean)
    if isinstance(content, list):
        content = _join_parts(content, clean)
    if content is None and (clean.get("tool_calls") or REASONING[0] in clean):
        content = ""
    if not isinstance(content, str):
        raise NotAConversation("content_not_a_string")
    return {"role": role, "content": content, **clean}


def _keep_reasoning(message: Mapping[str, Any], clean: Message) -> None:
    for key in REASONING:
        if isinstance(message.get(key), str) and message[key].strip():
            clean.setdefault(REASONING[0], message[key])
    held = [key for key, value in message.items() if UNREAD_REASONING.search(key) and _is_thought(key, value)]
    if REASONING[0] not in clean and any(not isinstance(message[key], str) or key not in REASONING for key in held):
        raise NotAConversation(f"reasoning_of_another_form: {', '.join(held)[:40]}")


def _is_thought(key: str, value: Any) -> bool:
    """Whether a field with such a name may hold reasoning: thinking: true and reasoning_tokens: 12 hold none, nor does
    the single word of reasoning_effort: high."""
    if key in REASONING:
        return bool(value) and not isinstance(value, bool)
    return bool(value) and (isinstance(value, list | Mapping) or (isinstance(value, str) and len(value.split()) > 1))


def _join_parts(parts: list[Any], message: Message) -> str:
    """The text of a content's parts; its thoughts and calls go where other forms have them."""
    read = [_part(part) for part in parts]
    if [PARTS[kind] for kind, _ in read] != sorted(PARTS[kind] for kind, _ in read):
        raise NotAConversation("content_parts_out_of_order")
    texts = ["".join(text for kind, text in read if PARTS[kind] == place) for place in (0, 1)]
    if texts[0].strip():
        message[REASONING[0]] = texts[0]
    if calls := [call for kind, text in read if kind == "tool_call" for call in said_calls(text)]:
        message["tool_calls"] = [read_call(call) for call in calls]
    return texts[1]


def _part(part: Any) -> tuple[str, str]:
    """(type, text) of one part of a content; a null, as columnar files fill in, is no text."""
    if isinstance(part, str):
        return "text", part
    if not isinstance(part, Mapping):
        raise NotAConversation("content_not_a_string")
    kind = part.get("type") or ("text" if "text" in part else "unknown")
    if kind not in PARTS:
        raise NotAConversation(f"content_part_{kind}_is_not_text")
    if not (names := [key for key in ("text", "value", "content", kind) if key in part]):
        raise NotAConversation("content_part_without_a_text")
    return kind, next((_text(part[key]) for key in names if part[key] is not None), "")


def _text(value: Any) -> str:
    """The text of a part: a string, one below `value` as OpenAI's threads have it, or a list of texts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(map(_text, value))
    if isinstance(value, Mapping):
        inner = next((value[key] for key in ("text", "value") if value.get(key) is not None), None)
        kind = str(value.get("type") or "text")
        if inner is not None and kind.endswith("text"):
            return _text(inner)
    raise NotAConversation("content_part_text_is_not_a_string")
