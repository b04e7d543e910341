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

from trainers.architecture import configs, cut_layers, distinct_layers
from trainers.job.schema import Job
from trainers.tasks import Example, TaskOptions, load_task
from trainers.verification.isolation import TOLERANCE, worst_leak
from trainers.verification.packing import PackingDecision

VOCABULARY, NARROW = 64, 64
WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp")
"""Sizes of feed-forward layers, which see one token at a time: no document leaks through them."""
SOME = (8, 11, 6)
"""Tokens of the documents that are packed."""


def ask(job: Job, model_path: str) -> PackingDecision:
    """Build the small model, pack three documents, change one, look at the others."""
    if job.model.attention.startswith("flash"):
        return PackingDecision(apart=True, reason=f"{job.model.attention} keeps documents apart by their bounds")
    task = load_task("pretrain", TaskOptions(packing=True))
    config = task.load_config(model_path, 0, job.model.trust_remote_code)
    attention = {} if job.model.attention == "auto" else {"attn_implementation": job.model.attention}
    reason = "no small model of this configuration can be made"
    for small in _smaller(config):
        try:
            torch.manual_seed(0)
            model: Any = transformers.AutoModelForCausalLM.from_config(small, **attention)
            draw = np.random.default_rng(0)
            rows = [
                Example(at, draw.integers(4, VOCABULARY - 2, size).astype(np.int32), {}) for at, size in enumerate(SOME)
            ]
            _, moved = worst_leak(model.eval(), task, rows, 0, torch.device("cpu"))
        except Exception as error:  # of whatever kind a model's code raises; the next size may do
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            continue
        if moved <= TOLERANCE:
            return PackingDecision(apart=True, reason="changing one document moves no logit of another")
        return PackingDecision(
            apart=False, reason=f"changing one document moves others' logits by {moved:.1g} of the largest"
        )
    return PackingDecision(apart=False, reason=reason)


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
            for name in WIDTHS if narrow else ():
                if isinstance(getattr(part, name, None), int):
                    setattr(part, name, NARROW)
        yield small
