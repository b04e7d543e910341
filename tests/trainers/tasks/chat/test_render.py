"""Conversations put together from pieces are what the template writes; the spans are where the assistant speaks."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CHAT_TEMPLATE
from tests.tiny import own_encoder
from tests.trainers.tasks.small import rows_of
from trainers.tasks import EncodeRules, load_task
from trainers.tasks.chat import render as chat_render
from trainers.tasks.chat.render import ChatRenderer, Rendered
from trainers.tasks.options import TaskOptions
from trainers.tokenizer.encoder import Encoder, load_encoder, read_spec
from trainers.tokenizer.gigatoken import TokenizerDiffers

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRIPPING = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set loop_messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set loop_messages = messages %}{% endif %}"
    "{% for m in loop_messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.first and system %}<<{{ system }}>> {% endif %}"
    "{{ m.content.strip() }} [/INST]{% else %} {{ m.content | trim }} <|im_end|>{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and '</think>' in m.content and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "stripping": STRIPPING, "thinking": THINKING, "tools": TOOLS}
CONTENTS = ["good film", " padded \n", "日本 👍", "<|im_end|> inside", "a\nb", "so </think> it is", "x" * 300, " "]


@pytest.fixture(autouse=True)
def shared_template(tiny_chat_tokenizer: Path) -> Iterator[None]:
    """What these tests do to templates stays out of the tokenizer that the whole process shares."""
    yield
    assert load_encoder(str(tiny_chat_tokenizer)).tokenizer.chat_template == CHAT_TEMPLATE
    assert Encoder(read_spec(tiny_chat_tokenizer)).tokenizer.chat_template == CHAT_TEMPLATE


def renderer(folder: Path, template: str, quick: bool) -> ChatRenderer:
    return ChatRenderer(load_encoder(str(folder)), quick, template)


def conversations(count: int) -> list[list[dict[str, Any]]]:
    draw = random.Random(1)
    found = []
    for _ in range(count):
        turns = [{"role": "system", "content": draw.choice(CONTENTS)}] if draw.random() < 0.5 else []
        for _ in range(draw.randint(1, 3)):
            turns += [{"role": role, "content": draw.choice(CONTENTS)} for role in ("user", "assistant")]
        found.append(turns)
    return found


@pytest.mark.parametrize("name", TEMPLATES)
def test_pieces_give_what_the_template_writes(name: str, tiny_chat_tokenizer: Path) -> None:
    quick = renderer(tiny_chat_tokenizer, TEMPLATES[name], True)
    exact = renderer(tiny_chat_tokenizer, TEMPLATES[name], False)
    taken = 0
    for messages in conversations(300):
        taken += quick._put_together(messages) is not None
        assert quick.render(messages) == exact.render(messages)
    assert taken > 50, "the quick way was hardly ever taken"


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_spans_hold_what_the_assistant_says_and_nothing_else(name: str, tiny_chat_tokenizer: Path) -> None:
    quick = renderer(tiny_chat_tokenizer, TEMPLATES[name], True)
    for messages in conversations(100):
        rendered = quick.render(messages)
        said = [m["content"] for m in messages if m["role"] == "assistant"]
        if isinstance(rendered, str):
            continue
        raw = rendered.text.encode()
        found = [raw[start:end].decode() for start, end in rendered.spans]
        for content, one in zip(said, found, strict=True):
            assert one.endswith("<|im_end|>"), "without its end the model would never learn to stop"
            shown = content.rpartition("</think>")[2] if rendered.note else content
            assert one.removesuffix("<|im_end|>").strip() in (content.strip(), shown.strip())


def test_a_template_that_acts_on_contents_unnoticed_is_caught_by_the_sample(
    tiny_chat_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sly = CHATML.replace("{{ m['content'] }}", "{{ m['content'][:5] if m['content'] | length > 50 else m['content'] }}")
    quick = renderer(tiny_chat_tokenizer, sly, True)
    monkeypatch.setattr(chat_render, "SAMPLE", 1)
    short = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert isinstance(quick.render(short), Rendered)
    with pytest.raises(TokenizerDiffers, match="put together from pieces"):
        quick.render([{"role": "user", "content": "a" * 60}, {"role": "assistant", "content": "b"}])


def test_tool_calls_are_what_the_assistant_says(tiny_chat_tokenizer: Path) -> None:
    messages = [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "look", "arguments": {"at": "sky"}}}],
        },
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ]
    rendered = renderer(tiny_chat_tokenizer, TOOLS, True).render(messages, [{"name": "look"}])
    assert isinstance(rendered, Rendered) and "look" in rendered.text.split("<|im_end|>")[0]
    said = [rendered.text.encode()[start:end].decode() for start, end in rendered.spans]
    assert said[0].startswith("<call>") and said[0].endswith("<|im_end|>") and said[1] == "It rains.<|im_end|>"


def test_a_conversation_that_the_template_refuses_is_dropped_not_raised(tiny_chat_tokenizer: Path) -> None:
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML
    refused = [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert renderer(tiny_chat_tokenizer, strict, True).render(refused) == "template_refuses: user first"


def test_bytes_and_offsets_find_the_same_targets(tiny_chat_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"messages": messages} for messages in conversations(80)]
    rules, task, encoder = EncodeRules(90, "truncate"), load_task("sft"), load_encoder(str(tiny_chat_tokenizer))
    by_bytes = rows_of(task.encode(rows, encoder, rules))
    exact = Encoder(encoder.spec, fast=False)
    exact.__dict__["bytes_of_ids"] = None
    by_offsets = rows_of(task.encode(rows, exact, rules))
    assert [one.outcome for one in by_bytes] == [one.outcome for one in by_offsets]
    assert {one.outcome for one in by_bytes} >= {"kept", "truncated"}
    for one, other in zip(by_bytes, by_offsets, strict=True):
        assert [list(s.input_ids) for s in one.sequences] == [list(s.input_ids) for s in other.sequences]
        decoded = [encoder.tokenizer.decode([s.input_ids[i] for a, b in _pairs(s.extra["spans"]) for i in range(a, b)])
                   for s in (*one.sequences, *other.sequences)]  # fmt: skip
        if decoded:
            assert decoded[0].split() == decoded[1].split()


def _pairs(flat: Any) -> list[tuple[int, int]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def targets(folder: Path, template: str, messages: list[dict[str, Any]], tools: Any = None) -> list[str] | str:
    rendered = renderer(folder, template, True).render(messages, tools)
    if isinstance(rendered, str):
        return rendered
    return [rendered.text.encode()[start:end].decode() for start, end in rendered.spans]


def asked(**answer: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes", **answer}]


QWEN = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set c, r = m.content, m.reasoning_content or '' %}"
    "{% if '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set c = c.split('</think>')[-1].strip() %}{% endif %}<|im_start|>{{ m.role }}\n"
    "{% if r and loop.index0 > ns.last %}<think>\n{{ r }}\n</think>\n\n{% endif %}{{ c }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def test_reasoning_is_a_target_in_either_form(tiny_chat_tokenizer: Path) -> None:
    thought = ["<think>\nbecause\n</think>\n\nyes<|im_end|>"]
    assert targets(tiny_chat_tokenizer, QWEN, asked(reasoning_content="because")) == thought
    assert targets(tiny_chat_tokenizer, QWEN, asked(content="<think>because</think>yes")) == thought


def test_hidden_earlier_thoughts_are_noted_and_a_thought_never_written_drops_the_row(tiny_chat_tokenizer: Path) -> None:
    messages = [*asked(reasoning_content="early"), *asked(reasoning_content="late")]
    rendered = renderer(tiny_chat_tokenizer, QWEN, True).render(messages)
    assert isinstance(rendered, Rendered) and rendered.note == "earlier_thinking_hidden"
    assert targets(tiny_chat_tokenizer, QWEN, messages) == [
        "yes<|im_end|>",
        "<think>\nlate\n</think>\n\nyes<|im_end|>",
    ]
    assert targets(tiny_chat_tokenizer, CHATML, messages) == "template_does_not_write_reasoning"


def test_what_a_template_does_not_write_drops_the_row(tiny_chat_tokenizer: Path) -> None:
    def call(*names: str) -> list[Any]:
        return [{"type": "function", "function": {"name": name, "arguments": {"at": "sky"}}} for name in names]

    tools, one = (
        [{"type": "function", "function": {"name": "look"}}],
        TOOLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"),
    )
    assert targets(tiny_chat_tokenizer, CHATML, asked(), tools) == "template_does_not_write_tools"
    calls = asked(content="", tool_calls=call("look"))
    assert targets(tiny_chat_tokenizer, CHATML, calls) == "template_does_not_write_tool_calls"
    twice = asked(content="", tool_calls=call("look", "look"))
    assert targets(tiny_chat_tokenizer, one, twice, tools) == "template_writes_one_tool_call_a_turn"
    mute = TOOLS.replace("{{ m.content }}", "{{ '' if m.tool_calls else m.content }}")
    both = asked(tool_calls=call("look"))
    assert targets(tiny_chat_tokenizer, mute, both) == "template_does_not_write_content_beside_tool_calls"
    bare = TOOLS.replace("c.function | tojson", "c.function.name")
    assert targets(tiny_chat_tokenizer, bare, calls) == "template_does_not_write_tool_arguments"


def test_a_user_that_is_not_written_drops_the_row_and_a_system_message_is_noted(tiny_chat_tokenizer: Path) -> None:
    talk = [{"role": "system", "content": "Be brief."}, *asked()]
    mute = CHATML.replace("for m in messages", "for m in messages if m.role != 'user'")
    assert targets(tiny_chat_tokenizer, mute, talk) == "template_does_not_write_the_user"
    for template, note in (
        (CHATML.replace("for m in messages", "for m in messages if m.role != 'system'"), True),
        (CHATML, False),
    ):
        rendered = renderer(tiny_chat_tokenizer, template, True).render(talk)
        assert isinstance(rendered, Rendered) and (rendered.note == "system_message_left_out") == note
        assert targets(tiny_chat_tokenizer, template, talk) == ["yes<|im_end|>"]


def test_what_closes_the_results_of_tools_is_no_target(tiny_chat_tokenizer: Path) -> None:
    """A template that notices at the answer that the results before it are over, and then asks for the answer."""
    closing = (
        "{% set ns = namespace(open=false) %}{% for m in messages %}{% if m.role == 'tool' %}"
        "{% if not ns.open %}{% set ns.open = true %}[{% endif %}{{ m.content }};"
        "{% else %}{% if ns.open %}{% set ns.open = false %}]{% endif %}HEAD{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if ns.open %}]{% endif %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = [{"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}]
    talk = [
        *asked(content="", tool_calls=call),
        {"role": "tool", "content": "blue"},
        {"role": "assistant", "content": "It is."},
    ]
    found = targets(tiny_chat_tokenizer, closing.replace("HEAD", "<|im_start|>{{ m.role }}\n"), talk)
    assert found[-1] == "It is.<|im_end|>"


def test_an_answer_looked_up_inside_another_message_says_nothing_there(tiny_chat_tokenizer: Path) -> None:
    """A template that searches the earlier calls for the name of a result."""
    search = (
        "{% if m.role == 'tool' %}{% for n in messages %}{% for c in n.tool_calls or [] %}{{ c.function.name }}"
        "{% endfor %}{% endfor %}: {% endif %}{{ m.content }}"
    )
    template = TOOLS.replace("{{ m.content }}", search)
    call = [{"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}]
    talk = [
        *asked(content="", tool_calls=call),
        {"role": "tool", "content": "blue"},
        {"role": "assistant", "content": "It is."},
    ]
    found = targets(tiny_chat_tokenizer, template, talk)
    assert found == ['<call>{"name": "look", "arguments": {"at": "sky"}}</call><|im_end|>', "It is.<|im_end|>"]


def test_a_template_for_tools_alone_has_its_turns_found(tiny_chat_tokenizer: Path) -> None:
    """Alone, and beside one for conversations without tools, as some tokenizers have both."""
    tools = [{"type": "function", "function": {"name": "look"}}]
    needy = CHATML.replace("{% for m", "{{ tools | first | tojson }}{% for m", 1)
    assert targets(tiny_chat_tokenizer, needy, asked(), tools) == ["yes<|im_end|>"]
    assert renderer(tiny_chat_tokenizer, needy, True).ending() == "<|im_end|>"
    assert str(targets(tiny_chat_tokenizer, needy, asked())).startswith("template_refuses")
    encoder = own_encoder(tiny_chat_tokenizer)
    encoder.tokenizer.chat_template = {"default": CHATML, "tool_use": needy}
    for offered in (None, tools):
        rendered = ChatRenderer(encoder).render(asked(), offered)
        assert isinstance(rendered, Rendered) and ("look" in rendered.text) == (offered is not None)
        assert [rendered.text.encode()[slice(*span)].decode() for span in rendered.spans] == ["yes<|im_end|>"]


def test_arguments_are_given_as_text_to_a_template_that_joins_them(tiny_chat_tokenizer: Path) -> None:
    joining = TOOLS.replace("c.function | tojson", "c.function.name + c.function.arguments")
    calls = [{"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}]
    found = targets(tiny_chat_tokenizer, joining, asked(content="", tool_calls=calls))
    assert found == ['<call>look{"at": "sky"}</call><|im_end|>']


def test_a_turn_ends_with_any_added_token_and_without_one_at_the_next_turns(tiny_chat_tokenizer: Path) -> None:
    encoder = own_encoder(tiny_chat_tokenizer)
    encoder.tokenizer.add_tokens(["<u>", "<a>", "<done>"])  # not special, and no name says what they are
    for written, found in (
        ("<done>\n", ["yes<done>", "yes<done>"]),
        ("", ["yes<u>", "yes"]),
        ("\n", ["yes\n<u>", "yes\n"]),
    ):
        encoder.tokenizer.chat_template = (
            "{% for m in messages %}{{ '<a>' if m.role == 'assistant' else '<u>' }}{{ m.content }}" + written
            + "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
        )  # fmt: skip
        rendered = ChatRenderer(encoder).render([*asked(), *asked()])
        assert isinstance(rendered, Rendered)
        assert [rendered.text[start:end] for start, end in rendered.spans] == found
        assert ChatRenderer(encoder).ending() == written.strip()


def test_tool_results_written_inside_a_turn_are_no_targets(tiny_chat_tokenizer: Path) -> None:
    inside = (
        "{% for m in messages %}{% if m.role != 'tool' %}<|im_start|>{{ m.role }}\n"
        "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
        "{% if m.tool_calls %}{% for k in range(loop.index0 + 1, messages | length) %}"
        "{% if messages[k].role == 'tool' %}{% set result = messages[k] %}<r>{{ result.content }}</r>{% endif %}"
        "{% endfor %}{% endif %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    calls = [{"type": "function", "function": {"name": "look", "arguments": {}}}]
    messages = [*asked(content="so", tool_calls=calls), {"role": "tool", "content": "rain"}]
    assert targets(tiny_chat_tokenizer, inside, messages) == [
        '<call>{"name": "look", "arguments": {}}</call>',
        "so<|im_end|>",
    ]


def by_turn(folder: Path, template: str, rows: list[Any], max_length: int = 200, each: bool = True) -> list[Any]:
    """(outcome, targets of each sequence) of rows, trained turn by turn."""
    encoder = load_encoder(str(folder))
    options = TaskOptions(chat_template=template, each_turn=each)
    batch = load_task("sft").encode(rows, encoder, EncodeRules(max_length, "drop", options))
    return [
        (one.outcome, ["|".join(encoder.tokenizer.decode(s.input_ids[a:b]) for a, b in _pairs(s.extra["spans"]))
                       for s in one.sequences])
        for one in rows_of(batch)
    ]  # fmt: skip


def test_each_turn_is_trained_in_a_rendering_that_ends_with_it(tiny_chat_tokenizer: Path) -> None:
    early, late = asked(reasoning_content="early"), asked(reasoning_content="late")
    row, plain = {"messages": [*early, *late]}, {"messages": [*asked(), *asked(content="no")]}
    thoughts = [f"<think>\n{word}\n</think>\n\nyes<|im_end|>" for word in ("early", "late")]
    assert by_turn(tiny_chat_tokenizer, QWEN, [row, plain, {"messages": []}, row]) == [
        ("kept", thoughts),
        ("kept", ["yes<|im_end|>|no<|im_end|>"]),
        ("dropped:no_target", []),
        ("kept", thoughts),
    ]
    (whole,) = by_turn(tiny_chat_tokenizer, QWEN, [row], each=False)
    assert whole == ("kept:earlier_thinking_hidden", [f"yes<|im_end|>|{thoughts[1]}"])
    muted = {"messages": [early[0], {**early[1], "weight": 0}, *late]}
    assert by_turn(tiny_chat_tokenizer, QWEN, [muted]) == [("kept", thoughts[1:])]
    assert by_turn(tiny_chat_tokenizer, CHATML, [row])[0][0] == "dropped:template_does_not_write_reasoning"


def test_renderings_that_are_too_long_are_told_of(tiny_chat_tokenizer: Path) -> None:
    early, late = asked(reasoning_content="early"), asked(reasoning_content="late " * 90)
    outcome, kept = by_turn(tiny_chat_tokenizer, QWEN, [{"messages": [*early, *late]}])[0]
    assert outcome == "truncated:turns_left_out" and kept == ["<think>\nearly\n</think>\n\nyes<|im_end|>"]
    assert by_turn(tiny_chat_tokenizer, QWEN, [{"messages": late}]) == [("dropped:overlong", [])]


def test_hidden_thoughts_are_counted_with_the_remedy(tiny_chat_tokenizer: Path) -> None:
    row = {"messages": [*asked(reasoning_content="early"), *asked(reasoning_content="late")]}
    rules = EncodeRules(200, "drop", TaskOptions(chat_template=QWEN))
    rows = [row, {"messages": asked()}, {"messages": []}]
    batch = load_task("sft").encode(rows, load_encoder(str(tiny_chat_tokenizer)), rules)
    ((note, count),) = batch.notes.items()
    assert count == 1 and "data.each_turn" in note


def test_the_templates_of_several_jobs_do_not_mix(tiny_chat_tokenizer: Path) -> None:
    encoder = load_encoder(str(tiny_chat_tokenizer))
    own, talk = encoder.tokenizer.chat_template, asked(reasoning_content="why")
    first = chat_render.renderer_of(encoder, True, QWEN).render(talk)
    assert chat_render.renderer_of(encoder, True, CHATML).render(talk) == "template_does_not_write_reasoning"
    assert isinstance(first, Rendered) and chat_render.renderer_of(encoder, True, QWEN).render(talk) == first
    assert encoder.tokenizer.chat_template == own
