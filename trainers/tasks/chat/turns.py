"""Conversations whose turns are trained each as the template writes it while it is the last, as it is generated.

Templates that hide the thoughts of earlier turns write a turn otherwise once another follows. Turns that are written
alike in a later rendering are trained there, so that other templates need one sequence a conversation, as ever.
"""

from collections.abc import Callable, Sequence, Set
from dataclasses import replace

import numpy as np

from trainers.tasks.chat.render import Message, Rendered
from trainers.tasks.chat.spans import HIDDEN
from trainers.tokenizer.token_arrays import TRUNCATED, EncodedBatch

LEFT_OUT = f"{TRUNCATED}:turns_left_out"
"""Outcome of a row of which some renderings, but not all, were too long."""


def render_each(
    render: Callable[[Sequence[Message]], Rendered | str], messages: Sequence[Message], muted: Set[int]
) -> list[Rendered] | str:
    """Renderings that together train every turn of the assistant but the muted, or why the row is dropped."""
    kept: list[Rendered] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant" or turn in muted:
            continue
        rendered = render(messages[: turn + 1])
        if isinstance(rendered, str):
            return rendered
        own = only_turns(rendered, {turn})
        own = replace(own, note=None if own.note == HIDDEN else own.note)  # a hidden thought has its own rendering
        if kept and _is_written_in(kept[-1], own):
            before = kept.pop()
            own = replace(own, spans=before.spans + own.spans, turns=before.turns + own.turns)
        kept.append(own)
    return kept


def only_turns(rendered: Rendered, turns: Set[int]) -> Rendered:
    """With the targets of some turns alone."""
    pairs = [pair for pair in zip(rendered.turns, rendered.spans, strict=True) if pair[0] in turns]
    return replace(rendered, turns=tuple(turn for turn, _ in pairs), spans=tuple(span for _, span in pairs))


def _is_written_in(earlier: Rendered, later: Rendered) -> bool:
    """Whether all that an earlier rendering trains, and what stands before it, is in a later one."""
    end = earlier.spans[-1][1] if earlier.spans else 0
    return later.text.encode()[:end] == earlier.text.encode()[:end]


def join_renderings(batch: EncodedBatch, counts: Sequence[int]) -> EncodedBatch:
    """A batch of renderings as one of rows: renderings become the parts of their row.

    Args:
        counts: renderings of each row, at least one.
    """
    owner = np.repeat(np.arange(len(counts)), counts)
    row = owner[batch.row]
    first = np.searchsorted(row, row, side="left")
    ends = np.cumsum(counts)[:-1]
    outcomes = [_joined([batch.outcomes[code] for code in some]) for some in np.split(batch.codes, ends)]
    order = {name: code for code, name in enumerate(dict.fromkeys(outcomes))}
    lost = np.bincount(owner, weights=batch.tokens_lost, minlength=len(counts)).astype(np.int32)
    return replace(
        batch,
        row=row,
        part=(np.arange(len(row)) - first).astype(np.int32),
        outcomes=tuple(order),
        codes=np.array([order[name] for name in outcomes], dtype=np.int32),
        tokens_lost=lost,
    )


def _joined(outcomes: Sequence[str]) -> str:
    """One outcome of a row, from those of its renderings."""
    kept = [name for name in outcomes if not name.startswith("dropped:")]
    if not kept:
        return outcomes[0]
    if len(kept) < len(outcomes):
        return LEFT_OUT
    return next((name for name in kept if name.startswith(TRUNCATED)), kept[0])
