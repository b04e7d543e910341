"""The tools that rows offer and the calls of them, in the shapes that data sets write, read as OpenAI's form."""

import json
from collections.abc import Mapping
from typing import Any

ARGUMENTS = ("arguments", "parameters", "args", "input", "kwargs")
"""Names of what a call is given."""


class NotAConversation(ValueError):
    """Why a row holds none, in a word for the ledger."""


def listed_calls(calls: Any) -> list[Any]:
    """Calls as a list, also where they stand as JSON in a text, as flat files have them."""
    if isinstance(calls, str):
        calls = _decoded(calls, "tool_calls_not_a_list")
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise NotAConversation("tool_calls_not_a_list")
    return calls


def said_calls(text: Any) -> list[Any]:
    """ShareGPT: a call, or a list of calls, as JSON in place of the content."""
    calls = _decoded(text, "tool_call_not_json")
    return [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]


def read_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call whose arguments are decoded once where they are JSON, as OpenAI's wire has them, without nulls."""
    function = call.get("function") if isinstance(call.get("function"), Mapping) else call
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise NotAConversation("tool_call_without_a_name")
    arguments = next((function[key] for key in ARGUMENTS if function.get(key) is not None), None)
    if isinstance(arguments, str):
        arguments = _decoded(arguments, "tool_arguments_not_json") if arguments.strip() else {}
    else:
        arguments = without_nulls(arguments) or {}
    if not isinstance(arguments, Mapping):
        raise NotAConversation("tool_arguments_not_an_object")
    ids = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**ids, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def read_tools(tools: Any) -> list[Any] | None:
    """The tools a row offers to the model, from a list or its JSON, each in OpenAI's form; None without any."""
    if isinstance(tools, str):
        tools = _decoded(tools, "tools_not_json") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list):
        raise NotAConversation("tools_not_a_list")
    read = [without_nulls(_decoded(tool, "tools_not_json") if isinstance(tool, str) else tool) for tool in tools]
    if not all(isinstance(tool, Mapping) for tool in read):
        raise NotAConversation("tools_not_a_list")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in read]


def _decoded(text: Any, otherwise: str) -> Any:
    """What JSON says. Raises NotAConversation with the word for what is none."""
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        raise NotAConversation(otherwise) from None


def without_nulls(value: Any) -> Any:
    """Without the keys that columnar formats fill with null because another row has them."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value
