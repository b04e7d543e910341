"""Where the assistant speaks in a conversation that a marked template wrote, and what the template left out.

A turn's targets begin behind what the template itself writes to ask for an answer (its generation prompt, or without
one what stands before the content of a plain answer) and end with the token that ends the turn. White space behind that
token is no target: generation has stopped by then.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainers.tasks.chat.template import MarkedText, Span

Message = Mapping[str, Any]
THINKING = re.compile(r"<\|?(?:think|thought|reason)[^>]*>|\[THINK\]|<\|START_THINKING\|>|<\|channel>thought", re.I)
"""What opens a thought. A generation prompt that ends with one asks for it; the thought belongs to the answer."""
INLINE = re.compile(r"\A(?:.*?<think>)?(.*?)</think>", re.DOTALL)
"""A thought inside a content; where the generation prompt opens it, data may hold its end alone."""
WORD = re.compile(r"[A-Za-z0-9]+")
LOST = {"user": "template_does_not_write_the_user", "tool": "template_does_not_write_tool_results"}
HIDDEN, UNSAID = "earlier_thinking_hidden", "system_message_left_out"
NOTES = (HIDDEN, UNSAID)
"""What a template may leave out of a row that is trained all the same."""


@dataclass(frozen=True)
class Turns:
    """How a template writes the turns of the assistant, as found with a plain conversation."""

    prompt: str
    """What asks for an answer, thoughts aside; "" where the template has no generation prompt."""
    before: str
    """What stands before the content of a plain answer."""
    after: tuple[str, str]
    """What stands behind that content, in the midst of a conversation and at its end."""
    tokens: tuple[str, ...]
    """All added tokens, longest first."""
    eos: str | None

    def header(self, written: str, said: int) -> int:
        """Characters at the start of what a turn wrote that ask for it and are not part of it.

        Args:
            said: where the first thing that the message says is written.
        """
        for header in (self.prompt, self.before if self.before.strip() else ""):
            shared = _shared(header, written)
            whole = max((end for end in self._borders(header) if end <= shared), default=0)
            if whole:
                return whole
        place = written.find(self.prompt) if self.prompt.strip() else -1  # behind what ends the tools' results, say
        return place + len(self.prompt) if 0 < place < said else 0

    def _borders(self, header: str) -> Iterator[int]:
        """Places where a header may end early: behind its lines and its added tokens."""
        yield len(header)
        yield from (place + 1 for place, character in enumerate(header) if character == "\n")
        for token in self.tokens:
            if token in header:
                yield header.index(token) + len(token)

    def end(self, marked: MarkedText, span: Span, last: bool) -> int:
        """Where the token that ends a turn ends, given the characters that the turn wrote."""
        written, text = marked.text[slice(*span)], marked.text
        ending = next((e for e in (self.after[last], self.after[not last]) if e.strip() and written.endswith(e)), None)
        closed = bool(self.after[last].strip())
        end = span[1] - (len(ending) - len(ending.rstrip()) if ending else 0)
        if ending is None and closed:
            end = span[0] + len(written.rstrip())
        bare = text[end:].lstrip()
        start = len(text) - len(bare)
        inside = any(a <= start < b for spans in marked.segments.values() for a, b in spans)
        if self.eos and bare.startswith(self.eos) and not (closed and inside):
            return start + len(self.eos)
        if closed:
            return end
        return end + len(next((token for token in self.tokens if text.startswith(token, end)), ""))


def _shared(first: str, second: str) -> int:
    """Characters that two texts begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(first), len(second)))


def speech_spans(messages: Sequence[Message], marked: MarkedText, turns: Turns) -> Iterator[tuple[int, Span]]:
    """(message, characters [start, end)) of everything the assistant says, in order."""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        segments = marked.segments.get(index, ())
        for number, (start, end) in enumerate(segments):
            if number == 0:
                start += turns.header(marked.text[start:end], _first_said(message, marked.text[start:end]))
            if number == len(segments) - 1:
                end = turns.end(marked, (start, end), index == len(messages) - 1)
            else:
                end = start + len(marked.text[start:end].rstrip())
            if start < end:
                yield index, (start, end)


def _first_said(message: Message, written: str) -> int:
    """Where the first of a message's content, thought and calls stands in what it wrote; 0 where none is found."""
    calls = [call.get("function", call)["name"] for call in message.get("tool_calls") or ()]
    texts = [text.strip() for text in (message["content"], message.get("reasoning_content", ""), *calls)]
    return min((place for text in texts if text and (place := written.find(text)) >= 0), default=0)


def find_loss(messages: Sequence[Message], tools: Any, marked: MarkedText) -> str | None:
    """What the template left out of a conversation, as a reason for the ledger; one of NOTES drops no row."""
    for tool in tools or ():
        name = tool.get("function", tool).get("name") if isinstance(tool, Mapping) else None
        if isinstance(name, str) and name not in marked.text:
            return "template_does_not_write_tools"
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    left_out = None
    for index, message in enumerate(messages):
        written = marked.of(index)
        if message["role"] != "assistant":
            if not (
                _says(marked.text, message["content"]) or (message["role"] != "tool" and _shows(marked.text, message))
            ):
                if message["role"] in LOST:
                    return LOST[message["role"]]
                left_out = left_out or UNSAID
            continue
        if reason := _lost_calls(message, written):
            return reason
        words = WORD.findall(INLINE.sub("", message["content"]).casefold())
        if not written or (words and not any(word in written.casefold() for word in words)):
            return "template_does_not_write_the_turn"
        inline = INLINE.search(message["content"])
        thought = message.get("reasoning_content") or (inline[1] if inline else "")
        if " ".join(thought.split()) not in " ".join(written.split()):
            if index == last:
                return "template_does_not_write_reasoning"
            left_out = HIDDEN
    return left_out


def _lost_calls(message: Message, written: str) -> str | None:
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    for call in calls:
        if not _says(written, call["name"]):
            return "template_does_not_write_tool_calls"
        if not _says(written, " ".join(_strings(call.get("arguments")))):
            return "template_does_not_write_tool_arguments"
    if calls and sum(written.count(name) for name in {call["name"] for call in calls}) < len(calls):
        return "template_writes_one_tool_call_a_turn"
    if calls and not _says(written, INLINE.sub("", message["content"])):
        return "template_does_not_write_content_beside_tool_calls"
    return None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _shows(written: str, message: Message) -> bool:
    """Whether most words of a message are written, in whatever case; templates take orders such as /no_think out."""
    words, folded = WORD.findall(message["content"].casefold()), written.casefold()
    return 2 * sum(word in folded for word in words) >= len(words)


def _says(written: str, text: str) -> bool:
    """Whether a text was written, however it was escaped, trimmed or set in lines."""
    return text.strip() in written or json.dumps(text)[1:-1] in written or (
        bool(words := WORD.findall(text)) and all(word in written for word in words)
    )  # fmt: skip
