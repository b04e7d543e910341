"""Asks an architecture whether it keeps packed documents apart: by a model of the same configuration with random
weights, few layers and few tokens, so that the answer needs neither the weights nor a GPU.

Attention kernels for sequences of varying length run on GPUs alone; they are taken at their word here and asked again
by every rank.
"""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import transformers

from trainers.architecture import DOCUMENTS, cut_layers, distinct_layers, shrink, stateful_layers
from trainers.job.schema import Job
from trainers.tasks import Example, Task, TaskOptions, load_task
from trainers.verification.isolation import TOLERANCE, logits_of, worst_leak
from trainers.verification.packing import PackingDecision

VOCABULARY, NARROW = 64, 64
SOME = (8, 11, 6)
"""Tokens of the documents that are packed."""
NEAR = 5
"""Positions that a sliding window or a chunk holds in the small model, so that documents are longer."""
ALIKE = 1e-5
"""Share of the largest logit that another order of sums may move."""
DEVICES = (torch.device("cpu"), torch.device("cuda"))
"""Kernels of layers that carry a state along run on GPUs alone, and raise elsewhere."""


def ask(job: Job, model_path: str) -> PackingDecision:
    """Build the small model, pack three documents, change one, look at the others; then ask whether attention by bounds
    gives the logits of each document alone."""
    if job.model.attention.startswith("flash"):
        return PackingDecision(apart=True, reason=f"{job.model.attention} keeps documents apart by their bounds")
    task = load_task("pretrain", TaskOptions(packing=True))
    config = task.load_config(model_path, 0, job.model.trust_remote_code)
    attention = {} if job.model.attention == "auto" else {"attn_implementation": job.model.attention}
    reason = "no small model of this configuration can be made"
    draw = np.random.default_rng(0)
    rows = [Example(at, draw.integers(4, VOCABULARY - 2, size).astype(np.int32), {}) for at, size in enumerate(SOME)]
    for small in _smaller(config):
        for device in DEVICES if torch.cuda.is_available() else DEVICES[:1]:
            try:
                torch.manual_seed(0)
                model: Any = transformers.AutoModelForCausalLM.from_config(small, **attention).eval().to(device)
                return _look(model, task, rows, job.model.attention == "auto", device)
            except Exception as error:  # of whatever kind a model's code raises; the next size may do
                reason = _first_line(error)
    return PackingDecision(apart=False, reason=reason)


def _look(model: Any, task: Task, rows: list[Example], is_free: bool, device: Any) -> PackingDecision:
    """What the small model says. Raises what its code raises.

    Args:
        is_free: whether the attention backend may be another.
    """
    has_states = bool(stateful_layers(model))
    by_bounds = is_free and not has_states and _computes_alone(model, rows, device)
    try:
        _, moved = worst_leak(model, task, [rows], 0, device)
    except Exception:  # transformers has no kernel that goes by bounds for layers that carry a state along
        by_bounds = has_states and is_free and _computes_alone(model, rows, device)
        if not by_bounds:
            raise
        moved = 0.0
    if has_states and is_free and moved > TOLERANCE:
        by_bounds = _computes_alone(model, rows, device)
    if moved <= TOLERANCE or by_bounds:
        return PackingDecision(
            apart=True,
            reason="changing one document moves no logit of another",
            attention=DOCUMENTS if by_bounds else None,
        )
    return PackingDecision(
        apart=False, reason=f"changing one document moves others' logits by {moved:.1g} of the largest"
    )


def _computes_alone(model: Any, rows: list[Example], device: Any) -> bool:
    """Whether attention by the bounds of documents, and layers that carry a state along from bound to bound, give what
    the model says to each document alone, packed with others or not."""
    import trainers.architecture.document_attention  # noqa: F401  # known to transformers from then on
    from trainers.architecture.document_states import keep_states_apart

    packed, single = (load_task("pretrain", TaskOptions(packing=packing)) for packing in (True, False))
    truth = [logits_of(model, single, single.collate([[row]], 0), device)[0] for row in rows]
    try:
        config = copy.deepcopy(model.config)
        other: Any = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=DOCUMENTS)
        other.eval().to(device).load_state_dict(model.state_dict())
        keep_states_apart(other)
        said = logits_of(other, packed, packed.collate([rows[:2], rows[2:]], 0), device)
    except Exception:  # what a model's own code raises where it does not know such a backend
        return False
    first, second, third = SOME
    parts = [said[0, :first], said[0, first : first + second], said[1, :third]]
    apart = max(float((ours - theirs).abs().max()) for ours, theirs in zip(parts, truth, strict=True))
    return apart <= ALIKE * max(float(logits.abs().max()) for logits in truth)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _smaller(config: Any) -> Iterator[Any]:
    """Configurations to try, the smallest first: few tokens, a layer of each kind, narrow feed-forward layers: they see
    one token at a time, so that no document leaks through them."""
    for narrow in (True, False):
        small = copy.deepcopy(config)
        cut_layers(small, distinct_layers(small))
        shrink(small, VOCABULARY, NEAR, NARROW if narrow else None)
        yield small
