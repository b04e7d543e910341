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

from trainers.architecture import DOCUMENTS, configs, convolves, cut_layers, distinct_layers, text_config
from trainers.job.schema import Job
from trainers.tasks import Example, TaskOptions, load_task
from trainers.verification.isolation import TOLERANCE, logits_of, worst_leak
from trainers.verification.packing import PackingDecision

VOCABULARY, NARROW = 64, 64
WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp")
"""Sizes of feed-forward layers, which see one token at a time: no document leaks through them."""
SOME = (8, 11, 6)
"""Tokens of the documents that are packed."""
NEAR = 5
"""Positions that a sliding window or a chunk holds in the small model, so that documents are longer."""
ALIKE = 1e-5
"""Share of the largest logit that another order of sums may move."""
CPU = torch.device("cpu")


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
        try:
            torch.manual_seed(0)
            model: Any = transformers.AutoModelForCausalLM.from_config(small, **attention).eval()
            by_bounds = job.model.attention == "auto" and _computes_alone(model, rows)
            _, moved = worst_leak(model, task, [rows], 0, CPU)
        except Exception as error:  # of whatever kind a model's code raises; the next size may do
            reason = _first_line(error)
            continue
        if moved <= TOLERANCE or by_bounds:
            return PackingDecision(
                apart=True,
                reason="changing one document moves no logit of another",
                attention=DOCUMENTS if by_bounds else None,
            )
        return PackingDecision(
            apart=False, reason=f"changing one document moves others' logits by {moved:.1g} of the largest"
        )
    return PackingDecision(apart=False, reason=reason)


def _computes_alone(model: Any, rows: list[Example]) -> bool:
    """Whether attention by the bounds of documents gives what the model says to each document alone, packed with others
    or not. The model comes back as it was."""
    import trainers.document_attention  # noqa: F401  # known to transformers from then on

    before = str(text_config(model.config)._attn_implementation)
    if before != "sdpa" or convolves(model):
        return False
    packed, single = (load_task("pretrain", TaskOptions(packing=packing)) for packing in (True, False))
    truth = [logits_of(model, single, single.collate([[row]], 0), CPU)[0] for row in rows]
    model.set_attn_implementation(DOCUMENTS)
    try:
        said = logits_of(model, packed, packed.collate([rows[:2], rows[2:]], 0), CPU)
    except Exception:  # what a model's own code raises where it does not know such arguments
        return False
    finally:
        model.set_attn_implementation(before)
    first, second, third = SOME
    parts = [said[0, :first], said[0, first : first + second], said[1, :third]]
    apart = max(float((ours - theirs).abs().max()) for ours, theirs in zip(parts, truth, strict=True))
    return apart <= ALIKE * max(float(logits.abs().max()) for logits in truth)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _smaller(config: Any) -> Iterator[Any]:
    """Configurations to try, the smallest first: few tokens, a layer of each kind, narrow feed-forward layers."""
    for narrow in (True, False):
        small = copy.deepcopy(config)
        cut_layers(small, distinct_layers(small))
        for part in configs(small):
            for name, value in {"vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "pad_token_id": 0,
                                "bos_token_id": 1, "eos_token_id": 2}.items():  # fmt: skip
                if getattr(part, name, None) is not None:
                    setattr(part, name, value)
            for name in ("sliding_window", "attention_chunk_size"):
                if getattr(part, name, None):
                    setattr(part, name, NEAR)
            for name in WIDTHS if narrow else ():
                if isinstance(getattr(part, name, None), int):
                    setattr(part, name, NARROW)
        yield small
