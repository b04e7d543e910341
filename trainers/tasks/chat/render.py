"""A conversation as the model's chat template writes it, with the places where the assistant speaks.

The quick way renders a template once for each sequence of roles, with markers for the contents, and from then on puts
pieces together. It is taken for rows whose contents the template only copies; the others, and rows drawn as a sample,
are rendered by the template itself. Begin at `ChatRenderer.render`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import xxhash

from trainers.errors import DataError
from trainers.tasks.chat.spans import NOTES, THINKING, Turns, find_loss, speech_spans
from trainers.tasks.chat.template import MarkedTemplate, MarkedText, Span, acted_upon
from trainers.tokenizer.encoder import Encoder
from trainers.tokenizer.gigatoken import TokenizerDiffers

Message = Mapping[str, Any]
Result = TypeVar("Result")
PAD_LEFT, PAD_RIGHT = " \n ", " \n "
SAMPLE = 256
"""One row in so many is rendered both ways."""
CHARACTERS = "\ue000", "\ue001"
"""Private-use characters that mark a content."""
OFFERED = [{"type": "function", "function": {"name": "look_up", "description": "a", "parameters": {}}}]
"""Tools for a template that writes nothing without."""
UNREADABLE = "template_hides_the_turns"


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    spans: tuple[Span, ...]
    """Bytes [start, end) of UTF-8 where the assistant speaks, the token that ends its turn included."""
    turns: tuple[int, ...]
    """The message that each span belongs to."""
    note: str | None = None
    """What the template left out of earlier turns."""


@dataclass(frozen=True)
class _Pieces:
    """A template for one sequence of roles: fixed text before, between and after the contents."""

    fixed: tuple[str, ...]
    sizes: tuple[int, ...]
    """Bytes of each fixed text."""
    strips: tuple[tuple[bool, bool], ...]
    """Whether a content loses white space on its left, and on its right."""
    reach: tuple[tuple[int, int] | None, ...]
    """Bytes of the targets before and after the content, for assistant turns; None for the others."""


class ChatRenderer:
    """Renders conversations for one tokenizer.

    Args:
        encoder: holds the template.
        quick: put pieces together where that gives the same.
        template: in place of the encoder's.
    """

    def __init__(self, encoder: Encoder, quick: bool = True, template: str | None = None) -> None:
        self._encoder, self._own = encoder, template
        self._pieces: dict[tuple[str, ...], _Pieces | None] = {}
        self._templates: dict[str, MarkedTemplate | None] = {}
        self._acted_upon = acted_upon(template or encoder.tokenizer.chat_template) if quick else None

    def render(self, messages: Sequence[Message], tools: Any = None) -> Rendered | str:
        """The conversation, or the reason why it cannot be trained on with this template.

        Raises:
            TokenizerDiffers: where pieces put together are not what the template writes.
        """
        quick = self._put_together(messages) if self._acted_upon is not None and not tools else None
        if quick is None:
            return self._exactly(messages, tools)
        if xxhash.xxh3_64_intdigest(quick.text.encode()) % SAMPLE == 0 and quick != self._exactly(messages, None):
            raise TokenizerDiffers(f"the chat template does not write {quick.text[:200]!r}, put together from pieces")
        return quick

    @cached_property
    def turns(self) -> Turns:
        """How this template begins and ends the assistant's turns."""
        asked = [{"role": "user", "content": "a"}]
        tools = None if self._write(asked, None) is not None else OFFERED  # what is written for tools alone
        plain, prompted = self._write(asked, tools), self._write(asked, tools, add_generation_prompt=True)
        prompt = prompted[len(plain) :] if plain and prompted and prompted.startswith(plain) else ""
        opener = THINKING.search(prompt)
        before, middle, end = "", "", ""
        mark = CHARACTERS[0]
        talk = [*asked, {"role": "assistant", "content": mark}]
        if (long := self._marked([*talk, *talk], tools)) is not None and mark in long.of(3):
            before, middle = long.of(1).split(mark)[0], long.of(1).split(mark)[-1]
            end = long.of(3).split(mark)[-1]
        elif (short := self._marked(talk, tools)) is not None and mark in short.of(1):
            before, end = short.of(1).split(mark)[0], short.of(1).split(mark)[-1]
            middle = end
        tokenizer = self._encoder.tokenizer
        tokens = sorted(tokenizer.added_tokens_encoder, key=len, reverse=True)
        return Turns(
            prompt[: opener.start()] if opener else prompt, before, (middle, end), tuple(tokens), tokenizer.eos_token
        )

    def ending(self) -> str:
        """The text that ends the last turn of the assistant; "" where nothing does, so that generation never stops."""
        answer = CHARACTERS[0]
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
        rendered = self._exactly(talk, None)
        rendered = self._exactly(talk, OFFERED) if isinstance(rendered, str) else rendered
        if isinstance(rendered, str) or not rendered.spans:
            return ""
        return rendered.text.encode()[slice(*rendered.spans[-1])].decode().rpartition(answer)[2].strip()

    def _put_together(self, messages: Sequence[Message]) -> Rendered | None:
        if self._acted_upon is None or any(map(self._has_more, messages)):
            return None
        contents = [message["content"] for message in messages]
        if not all(map(self._acted_upon.leaves, contents)):
            return None
        roles = tuple([message["role"] for message in messages])
        if roles not in self._pieces:
            self._pieces[roles] = self._compile(roles)
            if self._pieces[roles] is not None and not self._is_proven(roles):
                self._pieces[roles] = None
        pieces = self._pieces[roles]
        if pieces is None:
            return None
        parts, spans, turns, place = [pieces.fixed[0]], [], [], pieces.sizes[0]
        for turn, content in enumerate(contents):
            left, right = pieces.strips[turn]
            content = content.strip() if left and right else content.lstrip() if left else content
            content = content.rstrip() if right and not left else content
            end = place + (len(content) if content.isascii() else len(content.encode()))
            if (reach := pieces.reach[turn]) is not None:
                spans.append((place - reach[0], end + reach[1]))
                turns.append(turn)
            parts += [content, pieces.fixed[turn + 1]]
            place = end + pieces.sizes[turn + 1]
        return Rendered("".join(parts), tuple(spans), tuple(turns))

    def _is_proven(self, roles: tuple[str, ...]) -> bool:
        """Whether pieces give what the template writes for contents that a filter or a slice would change."""
        probe = [{"role": role, "content": f"{turn} aB. Zé\n- q{turn}"} for turn, role in enumerate(roles)]
        return self._put_together(probe) == self._exactly(probe, None)

    @staticmethod
    def _has_more(message: Message) -> bool:
        """Whether a message has more than a role and a content."""
        return len(message) != 2

    def _compile(self, roles: tuple[str, ...]) -> _Pieces | None:
        """Find the fixed pieces by rendering markers; None where a marker is lost, moved or doubled."""
        marks = [f"{CHARACTERS[0]}{turn}{CHARACTERS[1]}" for turn in range(len(roles))]
        marked = [
            {"role": role, "content": f"{PAD_LEFT}{mark}{PAD_RIGHT}"} for role, mark in zip(roles, marks, strict=True)
        ]
        rendered = self._exactly(marked, None)
        if isinstance(rendered, str) or any(rendered.text.count(mark) != 1 for mark in marks):
            return None
        span_of = dict(zip(rendered.turns, rendered.spans, strict=True))
        fixed: list[str] = []
        strips: list[tuple[bool, bool]] = []
        reach: list[tuple[int, int] | None] = []
        rest, place = rendered.text, 0
        for turn, mark in enumerate(marks):
            before, found, rest = rest.partition(mark)
            if not found:
                return None
            left, right = not before.endswith(PAD_LEFT), not rest.startswith(PAD_RIGHT)
            fixed.append(before if left else before.removesuffix(PAD_LEFT))
            rest = rest if right else rest.removeprefix(PAD_RIGHT)
            strips.append((left, right))
            start = place + len(fixed[-1].encode())
            place += len(before.encode()) + len(mark.encode()) + (0 if right else len(PAD_RIGHT))
            span = span_of.get(turn)
            reach.append((start - span[0], span[1] - place) if span else None)
        fixed.append(rest)
        if len(span_of) != roles.count("assistant") or any(pair and min(pair) < 0 for pair in reach):
            return None
        return _Pieces(tuple(fixed), tuple(len(piece.encode()) for piece in fixed), tuple(strips), tuple(reach))

    def _exactly(self, messages: Sequence[Message], tools: Any) -> Rendered | str:
        """By the template itself, written once as it is and once with marks."""
        for form in (messages, _with_texts(messages)) if any("tool_calls" in one for one in messages) else (messages,):
            text, marked = self._write(form, tools), self._marked(form, tools)
            if text is not None:
                break
        else:
            return self._refusal(messages, tools)
        if marked is None or marked.text != text or not marked.segments:
            return UNREADABLE
        loss = find_loss(messages, tools, marked)
        if loss is not None and loss not in NOTES:
            return loss
        turns, spans = [], []
        for turn, (start, end) in speech_spans(messages, marked, self.turns):
            turns.append(turn)
            spans.append((len(text[:start].encode()), len(text[:end].encode())))
        return Rendered(text, tuple(spans), tuple(turns), loss)

    def _refusal(self, messages: Sequence[Message], tools: Any) -> str:
        """The template's own words."""
        try:
            self._by_template(self._formed(messages), **({"tools": tools} if tools else {}))
        except Exception as error:
            return f"template_refuses: {' '.join(str(error).split())[:120]}"
        return UNREADABLE

    def _write(self, messages: Sequence[Message], tools: Any, **arguments: Any) -> str | None:
        """What the template writes, or None where it refuses the conversation (roles that must take turns, say)."""
        offered = {"tools": tools} if tools else {}
        return _tried(lambda: self._by_template(self._formed(messages), **offered, **arguments))

    def _by_template(self, messages: Sequence[dict[str, Any]], **arguments: Any) -> str:
        return self._encoder.render(messages, **({"chat_template": self._own} if self._own else {}), **arguments)

    def _formed(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        return _with_parts(messages) if self._wants_parts else [dict(message) for message in messages]

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template writes contents that are lists of parts alone, as those of many vision models do."""
        mark = CHARACTERS[0]
        talk: list[dict[str, Any]] = [{"role": role, "content": mark} for role in ("user", "assistant")]
        plain = _tried(lambda: self._by_template(talk)) or ""
        parts = _tried(lambda: self._by_template(_with_parts(talk))) or ""
        return plain.count(mark) < 2 <= parts.count(mark)

    def _template(self, tools: Any) -> MarkedTemplate | None:
        """The template for a conversation with or without tools: a tokenizer may have one for each."""
        source = self._own or self._encoder.tokenizer.get_chat_template(tools=tools or None)
        if source not in self._templates:
            self._templates[source] = _tried(lambda: MarkedTemplate(source))
        return self._templates[source]

    def _marked(self, messages: Sequence[Message], tools: Any) -> MarkedText | None:
        template, names = self._template(tools), self._encoder.tokenizer.special_tokens_map
        if template is None:
            return None
        return _tried(
            lambda: template.render(self._formed(messages), tools or None, add_generation_prompt=False, **names)
        )


def _tried(write: Callable[[], Result]) -> Result | None:
    """What a template gives, or None where it raises; a template may raise anything that jinja or Python does."""
    try:
        return write()
    except DataError:  # there is no template
        raise
    except Exception:
        return None


def _with_parts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def _with_texts(messages: Sequence[Message]) -> list[Message]:
    """The same with the arguments of calls as JSON, for templates that join them to a text."""
    return [
        {**message, "tool_calls": [_with_text(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _with_text(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
    changed = {**function, "arguments": text}
    return {**call, "function": changed} if "function" in call else changed


@lru_cache(maxsize=4)
def renderer_of(encoder: Encoder, quick: bool, template: str | None = None) -> ChatRenderer:
    """The renderer of an encoder, made once a process; a job's own template takes the place of the tokenizer's."""
    return ChatRenderer(encoder, quick, template)
