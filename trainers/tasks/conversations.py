"""The shapes in which data sets write conversations, read as one: a list of messages with role and content.

OpenAI `messages` (tool calls and text parts included), `prompt` and `completion` (strings, or messages as TRL has
them), ShareGPT `conversations`, Alpaca `instruction`, `input`, `output` with `system` and `history`.
"""

import json
from collections.abc import Mapping
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
Message = dict[str, Any]


class NotAConversation(ValueError):
    """Why a row holds none, in a word for the ledger."""


def read_messages(row: Mapping[str, Any]) -> list[Message] | str:
    """The conversation of a row, or the reason why there is none."""
    try:
        messages = [_checked(message) for message in _find(row)]
    except NotAConversation as reason:
        return str(reason)
    if not any(message["role"] == "assistant" and _speaks(message) for message in messages):
        return "no_target"
    return messages


def read_tools(row: Mapping[str, Any]) -> Any:
    """The tools a row offers to the model, from a list or its JSON; None where there are none."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            return None
    return tools or None


def _find(row: Mapping[str, Any]) -> list[Any]:
    if row.get("messages") is not None:
        messages = row["messages"]
    elif row.get("conversations") is not None:
        messages = _turns(row["conversations"])
    elif row.get("instruction") is not None and row.get("output") is not None:
        messages = _alpaca(row)
    elif row.get("prompt") is not None and row.get("completion") is not None:
        messages = _said(row["prompt"], "user") + _said(row["completion"], "assistant")
    else:
        raise NotAConversation("missing_messages")
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise NotAConversation("messages_not_a_list")
    system = row.get("system")
    if isinstance(system, str) and system.strip() and (not messages or messages[0].get("role") != "system"):
        return [{"role": "system", "content": system}, *messages]
    return messages


def _said(value: Any, role: str) -> list[Any]:
    return list(value) if isinstance(value, list) else [{"role": role, "content": value}]


def _turns(conversations: Any) -> list[Any]:
    """ShareGPT: {from, value} in place of {role, content}."""
    if not isinstance(conversations, list) or not all(isinstance(turn, Mapping) for turn in conversations):
        raise NotAConversation("messages_not_a_list")
    return [_turn(turn) if "from" in turn else turn for turn in conversations]


def _turn(turn: Mapping[str, Any]) -> Message:
    role = SHAREGPT_ROLES.get(str(turn["from"]), "")
    if turn["from"] != "function_call":
        return {"role": role, "content": turn.get("value")}
    try:
        call = json.loads(turn["value"])
        calls = [{"type": "function", "function": one} for one in (call if isinstance(call, list) else [call])]
    except (ValueError, TypeError):
        raise NotAConversation("tool_call_not_json") from None
    return {"role": role, "content": "", "tool_calls": calls}


def _alpaca(row: Mapping[str, Any]) -> list[Any]:
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise NotAConversation("history_not_pairs")
    instruction, extra = row["instruction"], row.get("input")
    asked = f"{instruction}\n{extra}" if isinstance(extra, str) and extra.strip() else instruction
    turns = [*history, [asked, row["output"]]]
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in turns for role, text in zip(roles, pair, strict=True)]


def _checked(message: Mapping[str, Any]) -> Message:
    """A message with known role and text content; keys without a value are left out. Raises NotAConversation."""
    if len(message) == 2 and message.get("role") in ROLES and isinstance(message.get("content"), str):
        return dict(message)
    clean = {key: value for key, value in message.items() if value is not None}
    if clean.get("role") not in ROLES:
        raise NotAConversation("unknown_role")
    content = clean.get("content")
    if isinstance(content, list) and all(isinstance(part, Mapping) and "text" in part for part in content):
        content = "".join(str(part["text"]) for part in content)
    if content is None and clean.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise NotAConversation("content_not_a_string")
    return {**clean, "content": content}


def _speaks(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))
