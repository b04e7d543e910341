"""Every shape of conversation is read as the same messages, and what is none has its reason."""

import json
from typing import Any

import pytest

from trainers.job.schema import TASK_FIELDS
from trainers.tasks.chat.conversations import OTHER_KINDS, Chat, read_chat

PLAIN = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
SHAPES: dict[str, dict[str, Any]] = {
    "openai": {"messages": PLAIN},
    "openai with empty keys": {"messages": [{**message, "tool_calls": None, "name": None} for message in PLAIN]},
    "text parts": {
        "messages": [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in PLAIN]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
    "named by hand": {
        "conversations": [{"speaker": "Human", "utterance": "Hi"}, {"author": "GPT", "message": "Hello!"}]
    },
    "parts with contents": {
        "messages": [{**message, "content": [{"type": "text", "content": message["content"]}]} for message in PLAIN]
    },
    "roles in conversations": {"conversations": PLAIN},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello!"},
    "prompt": {"prompt": "Hi", "completion": "Hello!"},
    "parts with values": {
        "messages": [
            {**message, "content": [{"type": "text", "value": message["content"]}], "loss_weight": float(index)}
            for index, message in enumerate(PLAIN)
        ]
    },
    "pygmalion": {"conversations": [{"role": one["role"], "value": one["content"]} for one in PLAIN]},
    "prompt of messages": {"prompt": PLAIN[:1], "completion": PLAIN[1:]},
}
REFUSED: dict[str, dict[str, Any]] = {
    "missing_messages": {"prompt": "Hi"},
    "messages_not_a_list": {"messages": "Hi"},
    "tool_arguments_not_an_object": {
        "messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '"{\\"x\\": 1}"'}}]}]
    },
    "reasoning_of_another_form": {
        "messages": [PLAIN[0], {**PLAIN[1], "reasoning_details": [{"type": "reasoning.text", "text": "hm"}]}]
    },
    "unknown_role": {"conversations": [{"from": "alien", "value": "Hi"}]},
    "content_not_a_string": {"messages": [{"role": "user", "content": 7}]},
    "tool_call_not_json": {"conversations": [{"from": "function_call", "value": "{"}]},
    "history_not_pairs": {"instruction": "Hi", "output": "x", "history": ["a"]},
    "no_target": {"messages": PLAIN[:1]},
    "tools_not_json": {"messages": PLAIN, "tools": "{"},
    "tool_arguments_not_json": {
        "messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}]
    },
    "tool_call_without_a_name": {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
    "preference_pairs": {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"},
    "media": {"messages": PLAIN, "images": ["a.png"]},
    "template_arguments": {"messages": PLAIN, "chat_template_kwargs": {"enable_thinking": False}},
    "preference_labels": {"messages": PLAIN, "label": False},
    "message_weight_is_neither_0_nor_1": {"messages": [PLAIN[0], {**PLAIN[1], "weight": 0.5}]},
    "train_detail_masks_parts_of_a_message": {
        "messages": [PLAIN[0], {**PLAIN[1], "train_detail": [{"begin_offset": 0, "end_offset": 2, "train": False}]}]
    },
    "a_message_that_is_not_the_assistant's_is_to_be_trained": {"messages": [{**PLAIN[0], "train": True}, PLAIN[1]]},
    "content_part_image_url_is_not_text": {
        "messages": [{"role": "user", "content": [{"type": "image_url", "value": "a.jpg"}]}, PLAIN[1]]
    },
    "content_part_without_a_text": {
        "messages": [{"role": "user", "content": [{"type": "text", "body": "Hi"}]}, PLAIN[1]]
    },
    "content_part_text_is_not_a_string": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": {"parts": 3}}]}, PLAIN[1]]
    },
    "system_not_a_string": {"messages": PLAIN, "system": ["be brief"]},
    "system_differs_from_the_system_message": {
        "messages": [{"role": "system", "content": "be long"}, *PLAIN],
        "system": "be brief",
    },
    "input_not_a_string": {"instruction": "add", "input": [2, 3], "output": "5"},
    "tools_not_a_list": {"messages": PLAIN, "tools": ["1"]},
    "content_parts_out_of_order": {
        "messages": [PLAIN[0], {"role": "assistant", "content": ["x", {"type": "reasoning", "value": "y"}]}]
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_read_alike(shape: str) -> None:
    assert read(SHAPES[shape]).messages == PLAIN


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_no_conversation_has_a_reason(reason: str) -> None:
    assert str(read_chat(REFUSED[reason])).partition(":")[0] == reason


def test_system_history_and_input_find_their_places() -> None:
    row = {"instruction": "add", "input": "2 3", "output": "5", "system": "be brief", "history": [["hi", "yes?"]]}
    assert read(row).messages == [
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
    chat = read(row)
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool"]
    assert chat.messages[1]["tool_calls"][0]["function"]["name"] == "look"
    assert chat.tools == [{"type": "function", "function": {"name": "look"}}]


def test_arguments_are_decoded_once_and_invented_nulls_go() -> None:
    def chat(arguments: Any) -> Chat:
        call = {"id": "c1", "index": None, "function": {"name": "f", "arguments": arguments}}
        parameters = {"type": "object", "properties": {"x": {"type": "integer", "enum": None}, "y": None}}
        answer = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": None}
        return read({"messages": [PLAIN[0], answer], "tools": [{"name": "f", "parameters": parameters}]})

    texts, nested = chat('{"x": 1, "z": null}'), chat({"x": 1, "y": None, "z": {"a": None}})
    assert texts.messages[1]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1, "z": None}}}
    ], "a null in JSON text was written by somebody"
    assert nested.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1, "z": {}}
    assert set(nested.messages[1]) == {"role", "content", "tool_calls"}
    assert nested.tools is not None
    assert nested.tools[0]["function"]["parameters"]["properties"] == {"x": {"type": "integer"}}


def test_messages_without_weight_are_read_and_not_trained() -> None:
    second = {"role": "assistant", "content": "Again!"}
    chat = read({"messages": [PLAIN[0], {**PLAIN[1], "weight": 0}, PLAIN[0], {**second, "weight": 1}]})
    assert chat.messages == [*PLAIN, PLAIN[0], second] and chat.muted == {1}
    assert read({"messages": [*PLAIN, {**PLAIN[1], "train": False}]}).muted == {2}
    assert read_chat({"messages": [PLAIN[0], {**PLAIN[1], "weight": 0.0}]}) == "no_target"


def test_what_messages_hold_beside_is_told() -> None:
    assert read({"messages": [{**PLAIN[0], "id": 7, "tone": None}, {**PLAIN[1], "rating": 5}]}).unread == {
        "id",
        "rating",
    }
    for name in ("training", "trainable"):
        chat = read({"messages": [PLAIN[0], {**PLAIN[1], name: False}, *PLAIN]})
        assert chat.muted == {1} and not chat.unread


def test_parts_without_text_are_no_text_and_other_parts_refuse_the_row() -> None:
    parts = [{"type": "text", "text": "H", "image": None}, {"type": "text", "text": None}, {"text": "i"}]
    assert read({"messages": [{"role": "user", "content": parts}, PLAIN[1]]}).messages == PLAIN
    image = {"messages": [{"role": "user", "content": [{"type": "image", "text": None}, *parts]}, PLAIN[1]]}
    assert read_chat(image) == "content_part_image_is_not_text"


def test_parts_may_be_thoughts_and_calls() -> None:
    parts = [
        {"type": "reasoning", "value": "hm"},
        {"type": "text", "value": "Look"},
        *({"type": "tool_call", "value": f'{{"name": "look", "arguments": {{"at": {at}}}}}'} for at in (1, 2)),
    ]
    answer = read({"messages": [PLAIN[0], {"role": "assistant", "content": parts}]}).messages[1]
    assert (answer["content"], answer["reasoning_content"]) == ("Look", "hm")
    assert [call["function"]["arguments"] for call in answer["tool_calls"]] == [{"at": 1}, {"at": 2}]
    thinking = {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "x"}]}
    assert read({"messages": [PLAIN[0], thinking]}).messages[1]["reasoning_content"] == "hm"


def test_a_text_below_value_or_in_a_list_of_texts_is_unwrapped() -> None:
    thread = [{"type": "text", "text": {"value": "Hi", "annotations": []}}]
    answer = [
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}, "."]},
        {"type": "output_text", "text": "Hello!", "annotations": []},
    ]
    rows = [{"role": "user", "content": thread}, {"role": "assistant", "content": answer}]
    assert read({"messages": rows}).messages == [PLAIN[0], {**PLAIN[1], "reasoning_content": "hm."}]
    for odd in (7, {"value": 7}, {"annotations": []}, [{"type": "image", "text": "Hi"}], [[1]]):
        row = {"messages": [{"role": "user", "content": [{"type": "text", "text": odd}]}, PLAIN[1]]}
        assert read_chat(row) == "content_part_text_is_not_a_string", odd


def test_a_name_with_reason_in_it_is_no_reasoning() -> None:
    beside = {"stop_reason": "end_turn", "finish_reason": "stop", "reasoning_tokens": 12, "reasoning_effort": "high"}
    chat = read({"messages": [PLAIN[0], {**PLAIN[1], **beside}]})
    assert chat.messages == PLAIN and chat.unread == set(beside)
    for other in ({"reasoningDetails": [{"text": "hm"}]}, {"thinking_blocks": {"text": "hm"}}, {"thoughts_en": "I see"},
                  {"reasoning": 7}):  # fmt: skip
        said = read_chat({"messages": [PLAIN[0], {**PLAIN[1], **other}]})
        assert str(said).startswith("reasoning_of_another_form"), other


def test_tools_that_are_no_objects_refuse_their_row_alone() -> None:
    for tools in (["look", "search"], '["look"]', "{"):
        assert read_chat({"messages": PLAIN, "tools": tools}) == "tools_not_json"
    for tools in (["1"], [1], "3", '"look"', {"name": "look"}):
        assert read_chat({"messages": PLAIN, "tools": tools}) == "tools_not_a_list"
    deep = "[" * 200_000
    assert read_chat({"messages": PLAIN, "tools": deep}) == "tools_not_json"
    assert read({"messages": PLAIN, "tools": ['{"name": "look"}']}).tools == [
        {"type": "function", "function": {"name": "look"}}
    ]


def test_a_system_column_that_says_what_the_messages_say_changes_nothing() -> None:
    system = {"role": "system", "content": "be brief"}
    for column in ("be brief ", "", None):
        assert read({"messages": [system, *PLAIN], "system": column}).messages == [system, *PLAIN]


def test_every_field_that_tells_of_another_kind_of_row_is_read() -> None:
    assert OTHER_KINDS.keys() <= set(TASK_FIELDS["sft"][1])


def test_columns_that_hold_nothing_refuse_no_row() -> None:
    empty = {"images": [], "chat_template_kwargs": {}, "kto_tag": None, "chosen": ""}
    assert read({"messages": PLAIN, **empty}).messages == PLAIN
    filled = {"chat_template_kwargs": {"enable_thinking": None}}  # as columnar files have it
    assert read({"messages": PLAIN, **filled}).messages == PLAIN


def test_a_label_that_is_no_verdict_does_not_refuse_a_row() -> None:
    assert read({"messages": PLAIN, "label": "greeting"}).messages == PLAIN
    assert str(read_chat({"messages": PLAIN, "kto_tag": True})).startswith("preference_labels")


def test_reasoning_goes_by_its_names() -> None:
    for name in ("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "thinking_content"):
        chat = read({"messages": [PLAIN[0], {**PLAIN[1], name: "hm"}]})
        assert chat.messages[1] == {**PLAIN[1], "reasoning_content": "hm"}
        chat = read({"messages": [{**PLAIN[0], name: "no answer"}, {**PLAIN[1], name: None, "thinking_mode": True}]})
        assert chat.messages == PLAIN
    for row in ({"prompt": "Hi", "completion": "Hello!"}, {"instruction": "Hi", "output": "Hello!"}):
        assert read({**row, "reasoning": "hm"}).messages[1] == {**PLAIN[1], "reasoning_content": "hm"}


def test_calls_and_tools_in_the_forms_that_flat_files_and_other_interfaces_have() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    for form in (
        [call],
        json.dumps([call]),
        call,
        [{"name": "f", "args": {"x": 1}}],
        [{"name": "f", "input": {"x": 1}}],
        [{"function": {"name": "f", "parameters": '{"x": 1}'}}],
    ):
        chat = read({"messages": [PLAIN[0], {"role": "assistant", "tool_calls": form}]})
        assert chat.messages[1]["tool_calls"] == [call], form
    functions = read({"messages": PLAIN, "functions": [{"name": "f"}]})
    assert functions.tools == [{"type": "function", "function": {"name": "f"}}]


def read(row: dict[str, Any]) -> Chat:
    chat = read_chat(row)
    assert isinstance(chat, Chat), chat
    return chat
