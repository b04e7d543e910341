"""Published chat templates beside shapes of conversations: our targets and those of the oracle.

The oracle is the training variant that `trl` ships of a template, with generation marks, read by transformers'
`apply_chat_template(..., return_assistant_tokens_mask=True)`. Run as a script it writes the table of docs/chats.md.
"""

from __future__ import annotations

import json
import re
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from tests.trainers.tasks.chat import handmade
from trainers.tasks.chat.conversations import read_chat
from trainers.tasks.chat.render import ChatRenderer, Rendered
from trainers.tokenizer.encoder import Encoder, read_spec

TOKEN = re.compile(r"<\|[^|<>\s]+\|>|<｜[^｜\s]+｜>|</?[a-z_]+>|<[a-z_]*\|>|<\|[a-z_]*>|\[/?[A-Za-z_]+\]")
"""What the templates write that is one added token in the published tokenizers."""
DOCS = Path(__file__).parents[4] / "docs" / "chats.md"
BEGIN, END = "<!-- table: written by tests/trainers/tasks/chat/table.py -->", "<!-- end of table -->"


def user(content: Any = "What is the weather in Oslo?") -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any = "It rains there.", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(city: str = "Oslo", as_text: bool = False, name: str = "look_up") -> dict[str, Any]:
    arguments: Any = {"city": city, "days": 2}
    return {
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments) if as_text else arguments},
    }


SYSTEM = {"role": "system", "content": "Be brief."}
RESULT = {"role": "tool", "content": "4 degrees", "name": "look_up"}
THOUGHT, INLINE = "Rain was forecast.", "<think>\nRain was forecast.\n</think>\n\nIt rains there."
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "The weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Its name"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]
PARTS = [{"type": "text", "text": "What is the weather "}, {"type": "text", "text": "in Oslo?"}]
SHAPES: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [user(), assistant()]},
    "several": {"messages": [user(), assistant(), user("And in Rome?"), assistant("The sun shines.")]},
    "system": {"messages": [SYSTEM, user(), assistant(), user("And in Rome?"), assistant("The sun shines.")]},
    "ends with user": {"messages": [user(), assistant(), user("Thanks.")]},
    "system alone before": {"messages": [SYSTEM, assistant("Hello, I am here."), user(), assistant()]},
    "same role twice": {"messages": [user(), user("In Oslo?"), assistant(), assistant("Take a coat.")]},
    "tools declared": {"messages": [user(), assistant()], "tools": TOOLS},
    "tool call": {"messages": [user(), assistant("", tool_calls=[call()])], "tools": TOOLS},
    "arguments as JSON": {"messages": [user(), assistant("", tool_calls=[call(as_text=True)])], "tools": TOOLS},
    "call with content": {
        "messages": [user(), assistant("Let me see.", tool_calls=[call()])],
        "tools": TOOLS,
    },
    "parallel calls": {"messages": [user(), assistant("", tool_calls=[call(), call("Rome")])], "tools": TOOLS},
    "tool result": {
        "messages": [user(), assistant("", tool_calls=[call()]), RESULT, assistant()],
        "tools": TOOLS,
    },
    "inline think": {"messages": [user(), assistant(INLINE)]},
    "reasoning_content": {"messages": [user(), assistant(reasoning_content=THOUGHT)]},
    "thought in history": {
        "messages": [
            user(),
            assistant(reasoning_content="Oslo is wet."),
            user("And in Rome?"),
            assistant("The sun shines.", reasoning_content="Rome is dry."),
        ]
    },
    "empty content": {"messages": [user(), assistant(""), user("Hello?"), assistant()]},
    "text parts": {"messages": [user(PARTS), assistant([{"type": "text", "text": "It rains there."}])]},
}


def templates() -> dict[str, tuple[str, str]]:
    """Name: (published template, training variant)."""
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    pairs = {}
    for file in sorted(folder.glob("*_training.jinja")):
        name = file.name.removesuffix("_training.jinja")
        pairs[name] = ((folder / f"{name}.jinja").read_text("utf-8"), file.read_text("utf-8"))
    return pairs | handmade.pairs()


def make_tokenizer(folder: Path, sources: list[str]) -> Path:
    """Bytes, and one added token for whatever the templates write as one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    words = sorted({token for source in sources for token in TOKEN.findall(source)} - {"<s>", "</s>", "<pad>"})
    fast.add_tokens(words)  # not special: no name says what they are
    fast.save_pretrained(folder)
    return folder


@lru_cache(maxsize=1)
def encoder_of(folder: str) -> Encoder:
    return Encoder(read_spec(folder))


@cache
def renderer_of(encoder: Encoder, source: str) -> ChatRenderer:
    encoder.tokenizer.chat_template = source
    return ChatRenderer(encoder)


def ours(encoder: Encoder, source: str, row: dict[str, Any]) -> tuple[str, set[int], str] | str:
    """Text, characters that are targets, and the prompt; or the reason of the refusal."""
    chat, renderer = read_chat(row), renderer_of(encoder, source)
    assert not isinstance(chat, str), chat
    encoder.tokenizer.chat_template = source
    rendered = renderer.render(chat.messages, chat.tools)
    if isinstance(rendered, str):
        return rendered
    raw = rendered.text.encode()
    return rendered.text, characters(raw, rendered), renderer.turns.prompt


def characters(raw: bytes, rendered: Rendered) -> set[int]:
    spans = [(len(raw[:start].decode()), len(raw[:end].decode())) for start, end in rendered.spans]
    return {place for start, end in spans for place in range(start, end)}


def oracle(encoder: Encoder, source: str, row: dict[str, Any], parts: bool) -> tuple[str, set[int]] | str:
    """Text, and characters of the tokens that the variant's generation marks hold; or its refusal.

    It is given contents as lists of parts where the template reads no others, and arguments as JSON where it refuses
    them as a dict.
    """
    tokenizer, chat = encoder.tokenizer, read_chat(row)
    assert not isinstance(chat, str)
    failed = ""
    for as_text in (False, True):
        messages = [dict(message) for message in chat.messages]
        for message in messages if parts else ():
            message["content"] = [{"type": "text", "text": message["content"]}]
        for message in messages if as_text else ():
            for one in message.get("tool_calls", ()):
                one["function"]["arguments"] = json.dumps(one["function"]["arguments"])
        try:
            said = tokenizer.apply_chat_template(
                messages,
                tools=chat.tools,
                chat_template=source,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            break
        except Exception as error:
            failed = failed or f"{type(error).__name__}: {error}"
    else:
        return failed
    text = tokenizer.apply_chat_template(messages, tools=chat.tools, chat_template=source, tokenize=False)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert encoding["input_ids"] == said["input_ids"]
    mask = said["assistant_masks"]
    offsets = encoding["offset_mapping"]
    return text, {place for on, (a, b) in zip(mask, offsets, strict=True) if on for place in range(a, b)}


def trimmed(text: str, marked: set[int], prompt: str, starts: list[int]) -> set[int]:
    """Less what asks for an answer, which some variants mark too, and white space behind the end of a turn."""
    heads = {place for start in starts if text[:start].endswith(prompt) for place in range(start - len(prompt), start)}
    kept: set[int] = set()
    for start, end in runs(marked - heads):
        head = next((size for size in range(len(prompt), 0, -1) if text.startswith(prompt[-size:], start)), 0)
        body = text[start + head : end].rstrip()
        kept |= set(range(start + head, start + head + len(body)))
    return kept


def runs(marked: set[int]) -> list[tuple[int, int]]:
    starts = sorted(place for place in marked if place - 1 not in marked)
    ends = sorted(place + 1 for place in marked if place + 1 not in marked)
    return list(zip(starts, ends, strict=True))


def shown(text: str, marked: set[int]) -> list[str]:
    return [text[start:end] for start, end in runs(marked)]


def compare(encoder: Encoder, published: str, variant: str, row: dict[str, Any]) -> tuple[str, Any]:
    """(verdict, what differs). `same`: the same targets of the same text. `same*`: the variant writes another text, and
    of that text the targets are the same."""
    encoder.tokenizer.chat_template = published
    parts = renderer_of(encoder, published)._wants_parts
    theirs, mine = oracle(encoder, variant, row, parts), ours(encoder, published, row)
    if isinstance(mine, str) and isinstance(theirs, str):
        return "both refuse", None
    if isinstance(mine, str):
        return f"refused: {mine}", None
    if isinstance(theirs, str):
        return "oracle refuses", theirs
    star = ""
    if mine[0] != theirs[0]:
        again = ours(encoder, re.sub(r"{%-?\s*(end)?generation\s*-?%}", "{##}", variant), row)
        if isinstance(again, str) or again[0] != theirs[0]:
            again = ours(encoder, variant, row)
        if isinstance(again, str):
            return f"refused: {again}*", None
        mine, star = again, "*"
    expected, found = (
        trimmed(theirs[0], marked, mine[2], [start for start, _ in runs(mine[1])]) for marked in (theirs[1], mine[1])
    )
    if mine[0] == theirs[0] and expected == found:
        return f"same{star}", None
    return f"differs{star}", (shown(*mine[:2]), shown(theirs[0], expected))


VERDICTS = {
    "same": ("=", "the same targets as the oracle"),
    "same*": ("≈", "the training variant writes another text; of that text the targets are the same"),
    "both refuse": ("×", "refused, as the oracle refuses it"),
    "refused: template_does_not_write_tools": ("t", "refused: template_does_not_write_tools"),
    "refused: template_does_not_write_tool_calls": ("c", "refused: template_does_not_write_tool_calls"),
    "refused: template_does_not_write_tool_arguments": ("a", "refused: template_does_not_write_tool_arguments"),
    "refused: template_does_not_write_content_beside_tool_calls": (
        "b",
        "refused: template_does_not_write_content_beside_tool_calls",
    ),
    "refused: template_does_not_write_reasoning": ("r", "refused: template_does_not_write_reasoning"),
    "handover": ("h", "the same, and `<|tool_response>`, with which the turn ends before a tool answers"),
}


def verdict_of(encoder: Encoder, pair: tuple[str, str], shape: str) -> str:
    verdict, difference = compare(encoder, *pair, SHAPES[shape])
    if verdict == "differs" and [one.removesuffix("<|tool_response>") for one in difference[0]] == difference[1]:
        return "handover"
    return verdict if difference is None else f"{verdict}: {difference}"


def table(verdicts: dict[tuple[str, str], str]) -> str:
    """The table of docs/chats.md."""
    lines = [f"{place}. {shape}" for place, shape in enumerate(SHAPES, 1)]
    head = ["| template |" + "|".join(f" {place} " for place in range(1, len(SHAPES) + 1)) + "|"]
    head += ["| --- |" + " :-: |" * len(SHAPES)]
    names = dict.fromkeys(name for name, _ in verdicts)
    rows = ["| " + name + " | " + " | ".join(VERDICTS[verdicts[name, s]][0] for s in SHAPES) + " |" for name in names]
    legend = [f"- `{letter}` {meaning}" for letter, meaning in VERDICTS.values()]
    return "\n".join([*lines, "", *head, *rows, "", *legend])


def main() -> None:
    import tempfile

    pairs = templates()
    with tempfile.TemporaryDirectory() as folder:
        encoder = encoder_of(str(make_tokenizer(Path(folder), [text for pair in pairs.values() for text in pair])))
        verdicts = {(name, shape): verdict_of(encoder, pairs[name], shape) for name in pairs for shape in SHAPES}
    for cell, verdict in verdicts.items():
        if verdict not in VERDICTS:
            print(*cell, verdict)
    before, _, rest = DOCS.read_text("utf-8").partition(BEGIN)
    DOCS.write_text(f"{before}{BEGIN}\n{table(verdicts)}\n{END}{rest.partition(END)[2]}", "utf-8")


if __name__ == "__main__":
    main()
