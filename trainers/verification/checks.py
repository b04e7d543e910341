"""The checks themselves: each looks at a sample and says whether a promise of the training holds, with the figure.

A check compares what training does with something computed another way: documents one by one, the model's own loss,
other tokens in the padding. Thresholds are for fp32 on one machine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trainers.batching.batch_plan import BatchPlan
from trainers.batching.order import Order
from trainers.checkpoint.slices import persistent_buffers
from trainers.checkpoint.tensor_file import spec_of, write_tensors
from trainers.tasks.base import IGNORE, Batch, Example
from trainers.verification import gradients as g
from trainers.verification.own_loss import own_loss
from trainers.verification.sample import PACK, CheckContext

CLOSE, CLOSE_HALF = 1e-5, 0.05
"""Relative difference of losses and gradients, in fp32 and in bf16."""
LEAK = 1e-4
"""Absolute difference of logits; kernels of another shape differ by about 1e-5, a leak by 1e-2 and more."""
SAME = 1e-6
"""Absolute difference of logits of equal weights: kernels differ by how the weights lie in memory."""
STEP_PACKS = 4
CUTS = ((1, 4), (2, 1), (4, 1))
"""World size and micro-batch; the accumulation makes up the rest of the step."""

Finding = tuple[bool, str]
Check = Callable[[CheckContext], Finding]


def isolation(context: CheckContext) -> Finding:
    """(a) Changing one document moves no logit of another in the same batch or pack."""
    packs = _fullest(context, 2)
    documents = g.rows_of(context, packs)
    before = g.collate(context, documents)
    row = documents[0][0]
    changed = _changed(row, context)
    after = g.collate(context, [[changed, *documents[0][1:]], *documents[1:]])
    first, second = (_by_row(context, batch, g.logits_of(context, batch)) for batch in (before, after))
    moved = max(
        (float((first[index] - second[index]).abs().max()) for index in first if index != row.index), default=0.0
    )
    others = len(first) - 1
    return moved <= LEAK, f"largest change in {others} other documents {moved:.1e}"


def packed_as_separate(context: CheckContext) -> Finding:
    """(b) Loss and gradient of a batch equal those of its documents one by one."""
    packs = [_packed(context), *_shortest(context, 1)]  # of unequal lengths, so that there is padding
    wanted, gradient = g.reference_gradient(context, packs, 1.0)
    context.model.zero_grad(set_to_none=True)
    loss = g.loss_of(context, g.collate(context, g.rows_of(context, packs)))
    loss.backward()
    off = abs(float(loss.detach()) - wanted) / max(abs(wanted), 1e-30)
    relative = g.relative_error(g.take_gradient(context.model), gradient)
    return max(off, relative) <= _close(context), f"loss off by {off:.1e}, gradient by {relative:.1e}"


def cut_of_step(context: CheckContext) -> Finding:
    """(c) The gradient of a step does not depend on world size x micro-batch x accumulation."""
    order = _order(context)
    packs = order.step(0).tolist()
    targets = sum(g.count_targets(g.collate(context, [[row]])) for pack in g.rows_of(context, packs) for row in pack)
    wanted, gradient = g.reference_gradient(context, packs, 1.0 / max(targets, 1))
    worst = 0.0
    for world, micro in CUTS:
        if STEP_PACKS % (world * micro) == 0:
            loss, found = g.gradient_of_step(
                context, order, BatchPlan(STEP_PACKS, world, micro, STEP_PACKS // world // micro)
            )
            worst = max(worst, g.relative_error(found, gradient), abs(loss - wanted) / max(abs(wanted), 1e-30))
    return worst <= _close(context), f"worst of {len(CUTS)} cuts {worst:.1e} off the documents one by one"


def each_row_once(context: CheckContext) -> Finding:
    """Over an epoch, the ranks together see each row exactly once."""
    order = replace(_order(context), total=len(context.packs))
    plan = BatchPlan(STEP_PACKS, 2, 1, STEP_PACKS // 2)
    sources = [g.source_of(context, order, plan, rank) for rank in range(2)]
    batches = [micro for step in range(order.steps) for source in sources for micro in source.next(step).micro_batches]
    seen = np.concatenate([batch.rows for batch in batches])
    rows = len(context.shards)
    return sorted(seen.tolist()) == list(range(rows)), f"{len(seen)} results of {len(np.unique(seen))} of {rows} rows"


def padding(context: CheckContext) -> Finding:
    """(d) Padding is never a target, and what stands in it does not matter."""
    full, *short = g.rows_of(context, [*_fullest(context, 1), *_shortest(context, 2)])
    batch = g.collate(context, [full, *(pack[:1] for pack in short)])
    holes = g.padded(batch)
    if holes is None or not holes.any():
        return True, "no padding in this sample"
    if batch.labels.shape == holes.shape and bool((batch.labels[holes] != IGNORE).any()):
        return False, f"{int((batch.labels[holes] != IGNORE).sum())} padded positions are targets"
    ids = batch.inputs["input_ids"].copy()
    ids[holes] = _other_token(context)
    if context.task.auto_class == "AutoModelForSequenceClassification" and "Llama" in type(context.model).__name__:
        return True, "the head finds a row's end by its padding, which therefore cannot be exchanged"
    losses = [
        float(g.loss_of(context, one).detach())
        for one in (batch, replace(batch, inputs={**batch.inputs, "input_ids": ids}))
    ]
    off = abs(losses[0] - losses[1]) / max(abs(losses[0]), 1e-30)
    detail = f"{int(holes.sum())} padded positions; other tokens there move the loss by {off:.1e}"
    return off <= _close(context), detail


def target_share(context: CheckContext) -> Finding:
    """(e) There are targets, as many as the shards say."""
    tokens, said = int(context.shards.lengths.sum()), int(context.shards.targets.sum())
    rows = [[context.shards.row(index)] for index in range(len(context.shards))]
    counted = sum(g.count_targets(g.collate(context, [pack])) for pack in rows)
    return 0 < said == counted, f"{said:,} targets by the shards, {counted:,} by the labels, in {tokens:,} tokens"


def model_agrees(context: CheckContext) -> Finding:
    """The loss equals the one that the model class computes by itself, so that labels stand where they should."""
    off, count = 0.0, 0
    for index in range(min(len(context.shards), 3)):
        row = context.shards.row(index)
        wanted = own_loss(context, row)
        if wanted is None:
            return True, "this task's model computes no loss of its own"
        found = float(g.loss_of(context, g.collate(context, [[row]])).detach())
        off, count = max(off, abs(found - wanted) / max(abs(wanted), 1e-6)), count + 1
    return off <= (CLOSE_HALF if context.is_half else 1e-4), f"worst of {count} rows off by {off:.1e}"


def reload(context: CheckContext) -> Finding:
    """(f) Weights written as exports write them and read back are the same bits and give the same logits."""
    batch = g.collate(context, g.rows_of(context, _shortest(context, 2)))
    before = g.logits_of(context, batch)
    weights = {name: tensor.detach().contiguous() for name, tensor in context.model.named_parameters()}
    weights |= dict(persistent_buffers(context.model))
    with tempfile.TemporaryDirectory(prefix="tuneyard-") as scratch:
        with (Path(scratch) / "model.safetensors").open("wb") as stream:
            write_tensors(stream, [spec_of(*item) for item in weights.items()], weights.__getitem__, {"format": "pt"})
        context.model.config.save_pretrained(scratch)
        loaded = type(context.model).from_pretrained(
            scratch, dtype=context.model.dtype, attn_implementation=context.model.config._attn_implementation
        )
    again = g.logits_of(replace(context, model=loaded.eval().to(context.device)), batch)
    changed = [name for name, p in loaded.named_parameters() if not p.equal(weights[name])]
    moved = float((before - again).abs().max())
    return not changed and moved <= SAME, f"{len(changed)} weights changed, logits by at most {moved:.1e}"


def _close(context: CheckContext) -> float:
    return CLOSE_HALF if context.is_half else CLOSE


def _order(context: CheckContext) -> Order:
    return Order(len(context.packs), STEP_PACKS, max(len(context.packs), STEP_PACKS), context.seed)


def _fullest(context: CheckContext, count: int) -> list[int]:
    """Packs of the most documents, then the longest."""
    documents = np.diff(context.packs.offsets)
    lengths = context.packs.sums(context.shards.lengths)
    return [int(pack) for pack in np.lexsort((-lengths, -documents))[:count]]


def _packed(context: CheckContext) -> int:
    """A pack of three documents or a few more, or the fullest where none has so many."""
    documents = np.diff(context.packs.offsets)
    several = np.flatnonzero(documents >= PACK)
    return int(several[np.argmin(documents[several])]) if len(several) else _fullest(context, 1)[0]


def _shortest(context: CheckContext, count: int) -> list[int]:
    order = np.argsort(context.packs.sums(context.shards.lengths), kind="stable")
    return [int(pack) for pack in order[:count]]


def _changed(row: Example, context: CheckContext) -> Example:
    """The row with other tokens in its middle, of the same length."""
    ids = np.array(row.input_ids)
    middle = slice(1, max(len(ids) - 1, 2))
    ids[middle] = np.where(ids[middle] == _other_token(context), _other_token(context) - 1, _other_token(context))
    return Example(row.index, ids, row.extra)


def _other_token(context: CheckContext) -> int:
    return int(context.model.config.vocab_size) - 2


def _by_row(context: CheckContext, batch: Batch, logits: Any) -> dict[int, Any]:
    """Logits of each document of a batch, padding left out."""
    if batch.segments is not None:
        return {int(row): logits[batch.segments == place] for place, row in enumerate(batch.rows)}
    lengths = batch.inputs["attention_mask"].sum(1)
    whole = logits.dim() == 3 and logits.shape[1] == batch.labels.shape[1] if batch.labels.ndim > 1 else False
    return {
        int(row): logits[place, : int(lengths[place])] if whole else logits[place]
        for place, row in enumerate(batch.rows)
    }


def in_doubt_in_fp64(check: Check) -> Check:
    """A check that is asked again in fp64 where fp32 says no: rounding gets smaller by 10^8, a fault stays."""

    def asked(context: CheckContext) -> Finding:
        passed, detail = check(context)
        if passed or context.is_half:
            return passed, detail
        context.model.double()
        try:
            passed, again = check(context)
        finally:
            context.model.float()
        return passed, f"{again} in fp64 ({detail} in fp32)"

    return asked


CHECKS: dict[str, Check] = {
    "isolation": isolation,
    "packed_as_separate": in_doubt_in_fp64(packed_as_separate),
    "cut_of_step": in_doubt_in_fp64(cut_of_step),
    "each_row_once": each_row_once,
    "padding": in_doubt_in_fp64(padding),
    "target_share": target_share,
    "model_agrees": model_agrees,
    "reload": reload,
}
