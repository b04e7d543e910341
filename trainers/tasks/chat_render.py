"""A conversation as the model's chat template writes it, with the places where the assistant speaks.

The quick way renders a template once for each sequence of roles, with markers for the contents, and from then on puts
pieces together. It is taken for rows whose contents the template only copies; the others, and rows drawn as a sample,
are rendered by the template itself. Begin at `ChatRenderer.render`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import xxhash

from trainers.tokenizer.encoder import Encoder
from trainers.tokenizer.gigatoken import TokenizerDiffers

Message = Mapping[str, Any]
Span = tuple[int, int]
PAD_LEFT, PAD_RIGHT = " \n ", " \n "
SAMPLE = 256
"""One row in so many is rendered both ways."""
STRIPPERS = frozenset({"strip", "lstrip", "rstrip", "trim"})
ACTING = STRIPPERS | {"split", "rsplit", "splitlines", "partition", "rpartition", "startswith", "endswith"}
ACTING |= {"replace", "find", "rfind", "index", "count", "removeprefix", "removesuffix", "truncate"}
KEYS = frozenset({"role", "content"})
CHARACTERS = "\ue000", "\ue001"
"""Private-use characters that mark a content."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    spans: tuple[Span, ...]
    """Bytes [start, end) of UTF-8 where the assistant speaks, the token that ends its turn included."""


@dataclass(frozen=True)
class _Pieces:
    """A template for one sequence of roles: fixed text before, between and after the contents."""

    fixed: tuple[str, ...]
    sizes: tuple[int, ...]
    """Bytes of each fixed text."""
    strips: tuple[tuple[bool, bool], ...]
    """Whether a content loses white space on its left, and on its right."""
    exits: tuple[int | None, ...]
    """Bytes of the special token that ends the turn, for assistant turns; None for the others."""


class ChatRenderer:
    """Renders conversations for one tokenizer.

    Args:
        encoder: holds the template.
        quick: put pieces together where that gives the same.
    """

    def __init__(self, encoder: Encoder, quick: bool = True) -> None:
        self._encoder = encoder
        self._pieces: dict[tuple[str, ...], _Pieces | None] = {}
        self._words = _words_acted_upon(encoder.tokenizer.chat_template) if quick else None
        self._specials = sorted(encoder.tokenizer.all_special_tokens, key=len, reverse=True)

    def render(self, messages: Sequence[Message], tools: Any = None) -> Rendered | None:
        """The conversation, or None where the template hides where the assistant speaks, or refuses it.

        Raises:
            TokenizerDiffers: where pieces put together are not what the template writes.
        """
        quick = self._put_together(messages) if self._words is not None and not tools else None
        if quick is None:
            return self._exactly(messages, tools)
        if xxhash.xxh3_64_intdigest(quick.text.encode()) % SAMPLE == 0 and quick != self._exactly(messages, None):
            raise TokenizerDiffers(f"the chat template does not write {quick.text[:200]!r}, put together from pieces")
        return quick

    def _put_together(self, messages: Sequence[Message]) -> Rendered | None:
        contents = [message["content"] for message in messages]
        if any(len(message) != 2 for message in messages) or not all(map(self._is_copied, contents)):
            return None
        roles = tuple([message["role"] for message in messages])
        if roles not in self._pieces:
            self._pieces[roles] = self._compile(roles)
            if self._pieces[roles] is not None and not self._is_proven(roles):
                self._pieces[roles] = None
        pieces = self._pieces[roles]
        if pieces is None:
            return None
        parts, spans, place = [pieces.fixed[0]], [], pieces.sizes[0]
        for turn, content in enumerate(contents):
            left, right = pieces.strips[turn]
            content = content.strip() if left and right else content.lstrip() if left else content
            content = content.rstrip() if right and not left else content
            end = place + (len(content) if content.isascii() else len(content.encode()))
            if (rank_exit := pieces.exits[turn]) is not None:
                spans.append((place, end + rank_exit))
            parts += [content, pieces.fixed[turn + 1]]
            place = end + pieces.sizes[turn + 1]
        return Rendered("".join(parts), tuple(spans))

    def _is_proven(self, roles: tuple[str, ...]) -> bool:
        """Whether pieces give what the template writes for contents that a filter or a slice would change."""
        probe = [{"role": role, "content": f"{turn} aB. Zé\n- q{turn}"} for turn, role in enumerate(roles)]
        return self._put_together(probe) == self._exactly(probe, None)

    def _is_copied(self, content: str) -> bool:
        return bool(content) and not content.isspace() and not any(word in content for word in self._words or ())

    def _compile(self, roles: tuple[str, ...]) -> _Pieces | None:
        """Find the fixed pieces by rendering markers; None where a marker is lost, moved or doubled."""
        marks = [f"{CHARACTERS[0]}{turn}{CHARACTERS[1]}" for turn in range(len(roles))]
        marked = [
            {"role": role, "content": f"{PAD_LEFT}{mark}{PAD_RIGHT}"} for role, mark in zip(roles, marks, strict=True)
        ]
        rest = self._write(marked, None)
        if rest is None or any(rest.count(mark) != 1 for mark in marks):
            return None
        fixed: list[str] = []
        strips: list[tuple[bool, bool]] = []
        for mark in marks:
            before, found, rest = rest.partition(mark)
            if not found:
                return None
            left, right = not before.endswith(PAD_LEFT), not rest.startswith(PAD_RIGHT)
            fixed.append(before if left else before.removesuffix(PAD_LEFT))
            rest = rest if right else rest.removeprefix(PAD_RIGHT)
            strips.append((left, right))
        fixed.append(rest)
        exits = [self._ending(fixed[turn + 1]) if role == "assistant" else None for turn, role in enumerate(roles)]
        sizes = tuple(len(piece.encode()) for piece in fixed)
        return _Pieces(tuple(fixed), sizes, tuple(strips), tuple(exits))

    def _exactly(self, messages: Sequence[Message], tools: Any) -> Rendered | None:
        """By the template itself. The spans come from rendering once more with markers for what the assistant says."""
        text = self._write(messages, tools)
        turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if text is None:
            return None
        spans = self._spans_by_marker(messages, turns, tools, text)
        if spans is None:
            spans = self._spans_by_prefix(messages, turns, tools, text)
        if spans is None:
            return None
        return Rendered(text, tuple((len(text[:a].encode()), len(text[:b].encode())) for a, b in spans))

    def _spans_by_marker(
        self, messages: Sequence[Message], turns: Sequence[int], tools: Any, text: str
    ) -> list[Span] | None:
        """What stands before and after each marker must stand before and after the content in the real text."""
        if any(messages[turn].get("tool_calls") for turn in turns):
            return None
        marks = {turn: f"{CHARACTERS[0]}{turn}{CHARACTERS[1]}" for turn in turns}
        rest = self._write([{**m, "content": marks[i]} if i in marks else m for i, m in enumerate(messages)], tools)
        spans: list[Span] = []
        cursor = 0
        for turn in turns:
            before, found, rest = (rest or "").partition(marks[turn])
            content = messages[turn]["content"]
            start = cursor + len(before)
            said = next((one for one in _trimmed(content) if text.startswith(one, start)), None)
            if not found or said is None or not text.startswith(before, cursor):
                return None
            cursor = start + len(said)
            spans.append((start, cursor + self._ending(rest)))
        return spans if text[cursor:] == rest else None

    def _spans_by_prefix(
        self, messages: Sequence[Message], turns: Sequence[int], tools: Any, text: str
    ) -> list[Span] | None:
        """From the generation prompt to the end of the turn, where shorter conversations begin longer ones."""
        spans: list[Span] = []
        for turn in turns:
            before = self._write(messages[:turn], tools, add_generation_prompt=True) if turn else None
            after = self._write(messages[: turn + 1], tools)
            if before is None or after is None or not after.startswith(before) or not text.startswith(after.rstrip()):
                return None
            spans.append((len(before), len(after.rstrip())))
        return spans

    def _write(self, messages: Sequence[Message], tools: Any, **arguments: Any) -> str | None:
        """What the template writes, or None where it refuses the conversation (roles that must take turns, say)."""
        from jinja2 import TemplateError

        try:
            offered = {"tools": tools} if tools else {}
            return self._encoder.render([dict(message) for message in messages], **offered, **arguments)
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            if type(error).__module__.startswith("trainers"):
                raise
            return None

    def _ending(self, after: str) -> int:
        """Bytes to the end of the special token that directly follows a turn, 0 where there is none.

        Before the end-of-sequence token there may be white space, as Llama 2's template has it; another token after
        white space may well begin the next turn.
        """
        eos, bare = self._encoder.tokenizer.eos_token, after.lstrip()
        if eos and bare.startswith(eos):
            return len(after.encode()) - len(bare.encode()) + len(eos.encode())
        return len(next((token for token in self._specials if after.startswith(token)), "").encode())


@lru_cache(maxsize=4)
def renderer_of(encoder: Encoder, quick: bool, template: str | None = None) -> ChatRenderer:
    """The renderer of an encoder, made once a process; a job's own template takes the place of the tokenizer's."""
    if template is not None:
        encoder.tokenizer.chat_template = template
    return ChatRenderer(encoder, quick)


def _trimmed(content: str) -> tuple[str, ...]:
    return content, content.lstrip(), content.rstrip(), content.strip()


def _words_acted_upon(template: Any) -> tuple[str, ...] | None:
    """Strings that a template looks for in contents, or cuts them at; None where it cannot be told.

    A content that holds one of them may be changed by the template, so its row is left to the template itself.
    """
    from jinja2 import Environment, TemplateError, nodes

    if not isinstance(template, str):
        return None
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])  # nothing is rendered with it
    try:
        tree = environment.parse(re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template))
    except TemplateError:
        return None
    words: set[Any] = set()
    for test in tree.find_all(nodes.Compare):
        if any(operand.op in ("in", "notin") for operand in test.ops):
            words |= _constants(test.expr)
    for filtered in tree.find_all(nodes.Filter):
        words |= _constants(*filtered.args) if filtered.name in ACTING else set()
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in ACTING:
            if call.node.attr in STRIPPERS and call.args:
                return None
            words |= _constants(*call.args)
    return tuple(sorted(word for word in words - KEYS if isinstance(word, str) and word))


def _constants(*expressions: Any) -> set[Any]:
    from jinja2 import nodes

    nested = [constant for one in expressions for constant in one.find_all(nodes.Const)]
    return {one.value for one in (*expressions, *nested) if isinstance(one, nodes.Const)}
