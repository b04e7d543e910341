"""Every shape of conversation is read as the same messages, and what is none has its reason."""

from typing import Any

import pytest

from trainers.tasks.conversations import read_messages, read_tools

PLAIN = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
SHAPES: dict[str, dict[str, Any]] = {
    "openai": {"messages": PLAIN},
    "openai with empty keys": {"messages": [{**message, "tool_calls": None, "name": None} for message in PLAIN]},
    "text parts": {
        "messages": [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in PLAIN]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
    "roles in conversations": {"conversations": PLAIN},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello!"},
    "prompt": {"prompt": "Hi", "completion": "Hello!"},
    "prompt of messages": {"prompt": PLAIN[:1], "completion": PLAIN[1:]},
}
REFUSED: dict[str, dict[str, Any]] = {
    "missing_messages": {"prompt": "Hi"},
    "messages_not_a_list": {"messages": "Hi"},
    "unknown_role": {"conversations": [{"from": "alien", "value": "Hi"}]},
    "content_not_a_string": {"messages": [{"role": "user", "content": 7}]},
    "tool_call_not_json": {"conversations": [{"from": "function_call", "value": "{"}]},
    "history_not_pairs": {"instruction": "Hi", "output": "x", "history": ["a"]},
    "no_target": {"messages": PLAIN[:1]},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_read_alike(shape: str) -> None:
    assert read_messages(SHAPES[shape]) == PLAIN


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_no_conversation_has_a_reason(reason: str) -> None:
    assert read_messages(REFUSED[reason]) == reason


def test_system_history_and_input_find_their_places() -> None:
    row = {"instruction": "add", "input": "2 3", "output": "5", "system": "be brief", "history": [["hi", "yes?"]]}
    assert read_messages(row) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "add\n2 3"},
        {"role": "assistant", "content": "5"},
    ]


def test_function_calls_become_tool_calls_and_tools_are_read_from_json() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "weather?"},
            {"from": "function_call", "value": '{"name": "look", "arguments": {}}'},
            {"from": "observation", "value": "rain"},
        ],
        "tools": '[{"name": "look"}]',
    }
    messages = read_messages(row)
    assert [message["role"] for message in messages] == ["user", "assistant", "tool"]  # type: ignore[index]
    assert messages[1]["tool_calls"][0]["function"]["name"] == "look"  # type: ignore[index]
    assert read_tools(row) == [{"name": "look"}] and read_tools({"tools": "{"}) is None
