"""The shapes in which data sets write conversations, read as one: a list of messages with role and content.

OpenAI `messages` (tool calls and text parts included), `prompt` and `completion` (strings, or messages as TRL has
them), ShareGPT `conversations`, Alpaca `instruction`, `input`, `output` with `system` and `history`.
"""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "ipython"), "tool"),
}
"""Role by the name that a data set gives it."""
REASONING = ("reasoning_content", "reasoning", "thinking", "thinking_content", "thought", "thoughts")
"""Names that a message's reasoning goes by; the first is the one handed to templates."""
UNREAD_REASONING = re.compile("reason|think|thought")
"""What the name of a field with reasoning in another form holds, such as reasoning_details."""
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
ARGUMENTS = ("arguments", "parameters", "args", "input", "kwargs")
"""Names of what a call is given."""
READ = frozenset((*KEPT_KEYS, *SPEAKERS, *TEXTS, *REASONING, *TRAINED, "function_call", "train_detail"))
Message = dict[str, Any]


class NotAConversation(ValueError):
    """Why a row holds none, in a word for the ledger."""


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
        raw = _find(row)
        messages = [_checked(message) for message in raw]
        tools = _tools(row.get("tools") or row.get("functions"))
        muted = frozenset(index for index, message in enumerate(raw) if _is_muted(message))
        unread = frozenset(
            str(key) for message in raw if len(message) > 2 for key in message.keys() - READ if message[key]
        )
    except NotAConversation as reason:
        return str(reason)
    if not any(_speaks(message) for index, message in enumerate(messages) if index not in muted):
        return "no_target"
    return Chat(messages, tools, muted, unread)


def _find(row: Mapping[str, Any]) -> list[Any]:
    for field, kind in () if OTHER_KINDS.keys().isdisjoint(row) else OTHER_KINDS.items():
        if _without_nulls(row.get(field)) not in (None, [], "", {}) and (
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
    system = row.get("system")
    if isinstance(system, str) and system.strip() and (not messages or _role(messages[0]) != "system"):
        return [{"role": "system", "content": system}, *messages]
    return messages


def _answer(row: Mapping[str, Any], text: Any) -> dict[str, Any]:
    """The assistant's turn of a row that is one, with reasoning that stands beside it."""
    return {"role": "assistant", "content": text, **{name: row[name] for name in REASONING if row.get(name)}}


def _alpaca(row: Mapping[str, Any]) -> list[Any]:
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise NotAConversation("history_not_pairs")
    instruction, extra = row["instruction"], row.get("input")
    asked = f"{instruction}\n{extra}" if isinstance(extra, str) and extra.strip() else instruction
    roles = ("user", "assistant")
    earlier = [{"role": role, "content": text} for pair in history for role, text in zip(roles, pair, strict=True)]
    return [*earlier, {"role": "user", "content": asked}, _answer(row, row["output"])]


def _role(message: Mapping[str, Any]) -> str | None:
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
    if marks and all(marks) and _role(message) != "assistant":
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
    role = _role(message)
    if role is None:
        raise NotAConversation("unknown_role")
    clean = {key: message[key] for key in KEPT_KEYS if message.get(key)}
    content = next((message[key] for key in TEXTS if message.get(key) is not None), None)
    if _speaker(message) == "function_call":
        clean["tool_calls"], content = _said_calls(content), ""
    if isinstance(old := message.get("function_call"), Mapping):  # OpenAI's form before tool calls
        clean["tool_calls"] = [{"type": "function", "function": old}]
    if "tool_calls" in clean:
        clean["tool_calls"] = [_call(call) for call in _listed(clean["tool_calls"])]
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
    held = [
        key for key in message if message[key] and not isinstance(message[key], bool) and UNREAD_REASONING.search(key)
    ]
    if REASONING[0] not in clean and any(not isinstance(message[key], str) or key not in REASONING for key in held):
        raise NotAConversation(f"reasoning_of_another_form: {', '.join(held)[:40]}")


def _join_parts(parts: list[Any], message: Message) -> str:
    """The text of a content's parts; its thoughts and calls go where other forms have them."""
    read = [_part(part) for part in parts]
    if [PARTS[kind] for kind, _ in read] != sorted(PARTS[kind] for kind, _ in read):
        raise NotAConversation("content_parts_out_of_order")
    texts = ["".join(text for kind, text in read if PARTS[kind] == place) for place in (0, 1)]
    if texts[0].strip():
        message[REASONING[0]] = texts[0]
    if calls := [call for kind, text in read if kind == "tool_call" for call in _said_calls(text)]:
        message["tool_calls"] = [_call(call) for call in calls]
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
    return kind, next((str(part[key]) for key in names if part[key] is not None), "")


def _listed(calls: Any) -> list[Any]:
    """Calls as a list, also where they stand as JSON in a text, as flat files have them."""
    if isinstance(calls, str):
        with suppress(ValueError):
            calls = json.loads(calls)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise NotAConversation("tool_calls_not_a_list")
    return calls


def _said_calls(text: Any) -> list[Any]:
    """ShareGPT: a call, or a list of calls, as JSON in place of the content."""
    try:
        calls = json.loads(text)
    except (ValueError, TypeError):
        raise NotAConversation("tool_call_not_json") from None
    return [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call whose arguments are decoded once where they are JSON, as OpenAI's wire has them, without nulls."""
    function = call.get("function") if isinstance(call.get("function"), Mapping) else call
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise NotAConversation("tool_call_without_a_name")
    arguments = next((function[key] for key in ARGUMENTS if function.get(key) is not None), None)
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError:
            raise NotAConversation("tool_arguments_not_json") from None
    else:
        arguments = _without_nulls(arguments) or {}
    if not isinstance(arguments, Mapping):
        raise NotAConversation("tool_arguments_not_an_object")
    ids = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**ids, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(tools: Any) -> list[Any] | None:
    """The tools a row offers to the model, from a list or its JSON, each in OpenAI's form; None without any."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise NotAConversation("tools_not_json") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping | str) for tool in tools):
        raise NotAConversation("tools_not_a_list")
    read = [_without_nulls(json.loads(tool) if isinstance(tool, str) else tool) for tool in tools]
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in read]


def _without_nulls(value: Any) -> Any:
    """Without the keys that columnar formats fill with null because another row has them."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
