"""The checks themselves: each looks at a sample and says whether a promise of the training holds, with the figure.

A check compares what training does with something computed another way: documents one by one, the model's own loss,
other tokens in the padding. Thresholds are for fp32 on one machine.
"""

import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from trainers.architecture import DOCUMENTS, attention_of, vocabulary
from trainers.architecture.document_states import keep_states_apart
from trainers.batching.batch_plan import BatchPlan
from trainers.batching.order import Order
from trainers.checkpoint.slices import persistent_buffers
from trainers.tasks.base import IGNORE
from trainers.tensor_file import spec_of, write_tensors
from trainers.verification import gradients
from trainers.verification.isolation import TOLERANCE, logit_change
from trainers.verification.own_loss import own_loss
from trainers.verification.sample import PACK, CheckContext

CLOSE, CLOSE_HALF = 1e-5, 0.05
"""Relative difference of losses and gradients, in fp32 and in bf16."""
ROUNDING = 1e-3
"""Relative difference in fp32 that counts where fp64 cannot be asked."""
SAME = 1e-6
"""Absolute difference of logits of equal weights: kernels differ by how the weights lie in memory."""
STEP_PACKS = 4
CUTS = ((1, 4), (2, 1), (4, 1))
"""World size and micro-batch; the accumulation makes up the rest of the step."""

Finding = tuple[bool, str]
Measured = tuple[float, str]
"""A relative error and what was measured."""
Check = Callable[[CheckContext], Finding]


def isolation(context: CheckContext) -> Finding:
    """(a) Changing one document moves no logit of another in the same batch or pack."""
    packs = gradients.rows_of(context, _fullest(context, 2))
    moved, others = logit_change(
        lambda batch: gradients.logits_of(context, batch), context.task, packs, 0, context.pad_id, gradients.DRAW
    )
    return moved <= TOLERANCE, f"largest change in {others} other documents {moved:.1e} of the largest logit"


def packed_as_separate(context: CheckContext) -> Measured:
    """(b) Loss and gradient of a batch equal those of its documents one by one."""
    packs = [_packed(context), *_shortest(context, 1)]  # of unequal lengths, so that there is padding
    reference, gradient = gradients.reference_gradient(context, packs, 1.0)
    context.model.zero_grad(set_to_none=True)
    loss = gradients.loss_of(context, gradients.collate(context, gradients.rows_of(context, packs)))
    loss.backward()
    of_loss = gradients.relative_difference(float(loss.detach()), reference)
    of_gradient = gradients.relative_error(gradients.take_gradient(context.model), gradient)
    return _worst(of_loss, of_gradient), f"loss off by {of_loss:.1e}, gradient by {of_gradient:.1e}"


def cut_of_step(context: CheckContext) -> Measured:
    """(c) The gradient of a step does not depend on world size x micro-batch x accumulation."""
    order = _order(context)
    packs = order.step(0).tolist()
    rows = [row for pack in gradients.rows_of(context, packs) for row in pack]
    targets = sum(gradients.count_targets(gradients.collate(context, [[row]])) for row in rows)
    reference, gradient = gradients.reference_gradient(context, packs, 1.0 / max(targets, 1))
    errors = []
    for world, micro in CUTS:
        plan = BatchPlan(STEP_PACKS, world, micro, STEP_PACKS // world // micro)
        loss, of_step = gradients.gradient_of_step(context, order, plan)
        errors += [gradients.relative_error(of_step, gradient), gradients.relative_difference(loss, reference)]
    worst = _worst(*errors)
    return worst, f"worst of {len(CUTS)} cuts {worst:.1e} off the documents one by one"


def each_row_once(context: CheckContext) -> Finding:
    """Over an epoch, the ranks together see each row exactly once."""
    order = replace(_order(context), total=len(context.packs))
    plan = BatchPlan(STEP_PACKS, 2, 1, STEP_PACKS // 2)
    sources = [gradients.source_of(context, order, plan, rank) for rank in range(2)]
    batches = [micro for step in range(order.steps) for source in sources for micro in source.next(step).micro_batches]
    seen = np.concatenate([batch.rows for batch in batches])
    rows = len(context.shards)
    return sorted(seen.tolist()) == list(range(rows)), f"{len(seen)} results of {len(np.unique(seen))} of {rows} rows"


def padding(context: CheckContext) -> Measured:
    """(d) Padding is never a target, and what stands in it does not matter."""
    full, *short = gradients.rows_of(context, [*_fullest(context, 1), *_shortest(context, 2)])
    batch = gradients.collate(context, [full, *(pack[:1] for pack in short)])
    holes = gradients.padded(batch)
    if holes is None or not holes.any():
        return 0.0, "no padding in this sample"
    by_position = batch.labels.shape == holes.shape and "target_ids" not in batch.inputs
    if by_position and bool((batch.labels[holes] != IGNORE).any()):
        return math.inf, f"{int((batch.labels[holes] != IGNORE).sum())} padded positions are targets"
    ids = batch.inputs["input_ids"].copy()
    ids[holes] = vocabulary(context.model.config) - 2
    other = replace(batch, inputs={**batch.inputs, "input_ids": ids})
    before, after = (float(gradients.loss_of(context, each).detach()) for each in (batch, other))
    moved = gradients.relative_difference(after, before)
    return _worst(moved), f"{int(holes.sum())} padded positions; other tokens there move the loss by {moved:.1e}"


def target_share(context: CheckContext) -> Finding:
    """(e) There are targets, as many as the shards say."""
    tokens, recorded = int(context.shards.lengths.sum()), int(context.shards.targets.sum())
    rows = [[context.shards.row(index)] for index in range(len(context.shards))]
    counted = sum(gradients.count_targets(gradients.collate(context, [pack])) for pack in rows)
    shown = f"{recorded:,} targets by the shards, {counted:,} by the labels, in {tokens:,} tokens"
    return 0 < recorded == counted, shown


def model_agrees(context: CheckContext) -> Finding:
    """The loss equals the one that the model class computes by itself, so that labels stand where they should."""
    errors = []
    for index in range(min(len(context.shards), 3)):
        row = context.shards.row(index)
        reference = own_loss(context, row)
        if reference is None:
            return True, "this task's model computes no loss of its own"
        loss = float(gradients.loss_of(context, gradients.collate(context, [[row]])).detach())
        errors.append(gradients.relative_difference(loss, reference, 1e-6))
    worst = _worst(*errors)
    return worst <= (CLOSE_HALF if context.is_half else 1e-4), f"worst of {len(errors)} rows off by {worst:.1e}"


def reload(context: CheckContext) -> Finding:
    """(f) Weights written as exports write them and read back are the same bits and give the same logits."""
    batch = gradients.collate(context, gradients.rows_of(context, _shortest(context, 2)))
    before = gradients.logits_of(context, batch)
    weights = {name: tensor.detach().contiguous() for name, tensor in context.model.named_parameters()}
    weights |= dict(persistent_buffers(context.model))
    with tempfile.TemporaryDirectory(prefix="tuneyard-") as scratch:
        with (Path(scratch) / "model.safetensors").open("wb") as stream:
            write_tensors(stream, [spec_of(*item) for item in weights.items()], weights.__getitem__, {"format": "pt"})
        context.model.config.save_pretrained(scratch)
        attention = attention_of(context.model)
        loaded = type(context.model).from_pretrained(scratch, dtype=context.model.dtype, attn_implementation=attention)
    if attention == DOCUMENTS:
        keep_states_apart(loaded)
    again = gradients.logits_of(replace(context, model=loaded.eval().to(context.device)), batch)
    changed = [name for name, p in loaded.named_parameters() if not p.equal(weights[name])]
    moved = float((before - again).abs().max())
    return not changed and moved <= SAME, f"{len(changed)} weights changed, logits by at most {moved:.1e}"


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


def _worst(*errors: float) -> float:
    """The largest; NaN where any is, which max() passes over."""
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def with_second_look(measure: Callable[[CheckContext], Measured]) -> Check:
    """A check that measures again in fp64 where fp32 is in doubt: rounding gets smaller by 10^8, a fault stays.

    Some models have no kernels for fp64 (mixtures of experts) or give NaN there. Then only an error beyond ROUNDING is
    a finding: the faults that these checks are for move losses and gradients by percents.
    """

    def check(context: CheckContext) -> Finding:
        error, detail = measure(context)
        if context.is_half:
            return error <= CLOSE_HALF, detail
        if error <= CLOSE:
            return True, detail
        again, said = _in_fp64(measure, context)
        if again is None or math.isnan(again):
            return error <= ROUNDING, f"{detail}; {said}, so more than {ROUNDING:.0e} counts"
        return again <= CLOSE, f"{said} in fp64 ({detail} in fp32)"

    return check


def _in_fp64(measure: Callable[[CheckContext], Measured], context: CheckContext) -> tuple[float | None, str]:
    context.model.double()
    try:
        error, detail = measure(context)
    except (RuntimeError, NotImplementedError) as failure:
        return None, f"fp64 is not available here ({str(failure).splitlines()[0]})"
    finally:
        context.model.float()
    return error, "fp64 gives NaN" if math.isnan(error) else detail


CHECKS: dict[str, Check] = {
    "isolation": isolation,
    "packed_as_separate": with_second_look(packed_as_separate),
    "cut_of_step": with_second_look(cut_of_step),
    "each_row_once": each_row_once,
    "padding": with_second_look(padding),
    "target_share": target_share,
    "model_agrees": model_agrees,
    "reload": reload,
}
