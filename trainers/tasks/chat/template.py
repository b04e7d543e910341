"""A chat template that says which message it is writing.

The template's own syntax tree is given marks: at the start of each iteration of a loop over messages, and after the
loop. Rendered with them, a text tells where each message stands, whatever the template does with a conversation;
nothing is assumed of prefixes, roles or tokens. The text without the marks must be what the template writes without
them, else the marks are not believed. Begin at `MarkedTemplate.render`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Span = tuple[int, int]
OPEN, CLOSE, END = "\ue010", "\ue011", "\ue012"
"""Private-use characters: OPEN loop:message CLOSE before what an iteration writes, END loop CLOSE after a loop."""
MARK = re.compile(f"{OPEN}(\\d+):(\\d+){CLOSE}|{END}(\\d+){CLOSE}")

STRIPPERS = frozenset({"strip", "lstrip", "rstrip", "trim"})
ACTING = STRIPPERS | {"split", "rsplit", "splitlines", "partition", "rpartition", "startswith", "endswith"}
ACTING |= {"replace", "find", "rfind", "index", "count", "removeprefix", "removesuffix", "truncate"}
KEYS = frozenset({"role", "content"})


@dataclass(frozen=True)
class MarkedText:
    """A conversation as text."""

    text: str
    segments: Mapping[int, tuple[Span, ...]]
    """Characters [start, end) that each message wrote, without those of messages written inside it; where a message
    that stands by itself is looked up inside another, too, what that wrote is not its own."""

    def of(self, message: int) -> str:
        """All that a message wrote."""
        return "".join(self.text[start:end] for start, end in self.segments.get(message, ()))


class MarkedTemplate:
    """One template, compiled with marks.

    Raises:
        jinja2.TemplateError: where the template cannot be parsed.
    """

    def __init__(self, source: str) -> None:
        from jinja2 import Template
        from transformers.utils import chat_template_utils

        self._prepare = chat_template_utils._plain_template_data
        self._alias = chat_template_utils._alias_reasoning_fields
        environment = chat_template_utils._compile_jinja_template(source).environment
        tree = _with_marks(environment.parse(source))
        self._template: Any = Template.from_code(environment, environment.compile(tree), environment.make_globals(None))

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Any, **arguments: Any) -> MarkedText:
        """Write a conversation; raises what the template raises."""
        chat = self._alias(self._prepare(list(messages)))
        number = {id(message): index for index, message in enumerate(chat)}
        open_loops: set[int] = set()

        def mark(loop: int, item: Any) -> str:
            if (index := number.get(id(item))) is None:
                return unmark(loop)
            open_loops.add(loop)
            return f"{OPEN}{loop}:{index}{CLOSE}"

        def unmark(loop: int) -> str:
            if loop not in open_loops:
                return ""
            open_loops.discard(loop)
            return f"{END}{loop}{CLOSE}"

        marks = {"mark_message": mark, "unmark_messages": unmark}
        return _read(self._template.render(messages=chat, tools=self._prepare(tools), **arguments, **marks))


def _with_marks(tree: Any) -> Any:
    """Put a mark at the start of every loop that writes something, and one behind it."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    def call(name: str, *arguments: Any) -> Any:
        return nodes.Output([nodes.Call(nodes.Name(name, "load"), list(arguments), [], None, None)])

    class Marker(NodeTransformer):
        loops = 0

        def visit_For(self, node: Any) -> Any:
            self.loops += 1
            number = nodes.Const(self.loops)
            self.generic_visit(node)
            if next(node.find_all(nodes.Output), None) is None or not isinstance(node.target, nodes.Name):
                return node
            name = node.target.name
            self._mark_items(node.body, number, name)
            node.body.insert(0, call("mark_message", number, nodes.Name(name, "load")))
            return [node, call("unmark_messages", number)]

        def _mark_items(self, body: list[Any], number: Any, name: str) -> None:
            """Loops over places: {% for i in range(...) %} ... {% set message = messages[i] %}."""
            for place, line in reversed(list(enumerate(body))):
                value = line.node if isinstance(line, nodes.Assign) and isinstance(line.target, nodes.Name) else None
                if isinstance(value, nodes.Getitem) and isinstance(value.arg, nodes.Name) and value.arg.name == name:
                    body.insert(place + 1, call("mark_message", number, nodes.Name(line.target.name, "load")))
                elif isinstance(line, nodes.If):
                    for branch in (line, *line.elif_):
                        self._mark_items(branch.body, number, name)
                    self._mark_items(line.else_, number, name)

    return Marker().visit(tree)


def _read(marked: str) -> MarkedText:
    """Take the marks out and note what stood between them."""
    segments: dict[int, list[Span]] = {}
    inside: dict[int, list[Span]] = {}
    owners: list[tuple[int, int]] = []  # (loop, message), innermost last
    parts: list[str] = []
    written = cursor = 0
    for mark in MARK.finditer(marked):
        piece = marked[cursor : mark.start()]
        _note(inside if len({message for _, message in owners}) > 1 else segments, owners, written, len(piece))
        written += len(piece)
        parts.append(piece)
        cursor = mark.end()
        loop = int(mark[1] or mark[3])
        while any(owner[0] == loop for owner in owners):
            owners.pop()
        if mark[1]:
            owners.append((loop, int(mark[2])))
    piece = marked[cursor:]
    _note(segments, owners, written, len(piece))
    segments = {index: sorted(spans) for index, spans in (inside | segments).items()}
    return MarkedText("".join([*parts, piece]), {index: tuple(spans) for index, spans in segments.items()})


def _note(segments: dict[int, list[Span]], owners: list[tuple[int, int]], start: int, length: int) -> None:
    if not owners or not length:
        return
    spans = segments.setdefault(owners[-1][1], [])
    if spans and spans[-1][1] == start:
        spans[-1] = (spans[-1][0], start + length)
    else:
        spans.append((start, start + length))


@dataclass(frozen=True)
class ActedUpon:
    """What makes a template change a content that holds it; such a row is left to the template itself."""

    words: tuple[str, ...]
    """Strings that it looks for in contents, or cuts them at."""
    edges: frozenset[str]
    """Characters that it strips from the ends of contents, beside white space as a whole."""

    def leaves(self, content: str) -> bool:
        """Whether a content, white space at its ends aside, is written as it is."""
        bare = content.strip()
        if not bare or (self.edges and not self.edges.isdisjoint((content[0], content[-1], bare[0], bare[-1]))):
            return False
        for word in self.words:  # noqa: SIM110 - a quarter of the time that all() takes with a generator
            if word in content:
                return False
        return True


def acted_upon(template: Any) -> ActedUpon | None:
    """What a template acts upon; None where it cannot be told."""
    from jinja2 import Environment, TemplateError, nodes

    if not isinstance(template, str):
        return None
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])  # nothing is rendered with it
    try:
        tree = environment.parse(re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template))
    except TemplateError:
        return None
    words: set[Any] = set()
    edges: set[str] = set()
    for test in tree.find_all(nodes.Compare):
        if any(operand.op in ("in", "notin") for operand in test.ops):
            words |= _constants(test.expr)
    for filtered in tree.find_all(nodes.Filter):
        words |= _constants(*filtered.args) if filtered.name in ACTING else set()
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in ACTING:
            if call.node.attr in STRIPPERS and call.args:
                if not isinstance(call.args[0], nodes.Const) or " " in (characters := str(call.args[0].value)):
                    return None
                edges |= set(characters)
            else:
                words |= _constants(*call.args)
    return ActedUpon(tuple(sorted(word for word in words - KEYS if isinstance(word, str) and word)), frozenset(edges))


def _constants(*expressions: Any) -> set[Any]:
    from jinja2 import nodes

    nested = [constant for one in expressions for constant in one.find_all(nodes.Const)]
    return {one.value for one in (*expressions, *nested) if isinstance(one, nodes.Const)}
