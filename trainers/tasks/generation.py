"""Generated texts for evaluation: prompts in, texts out, by transformers' generate. Knows nothing of metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainers.architecture import table_positions
from trainers.records import Array
from trainers.tasks.padding import pad_left, pad_right


def generate_texts(
    model: Any, prompts: Sequence[Array], tokenizer: Any, pad_id: int, settings: Mapping[str, Any], seed: Sequence[int]
) -> list[str]:
    """What the model says to each prompt, special tokens left out; no more than it has positions for beside the longest
    prompt.

    Args:
        model: a causal model or an encoder-decoder.
        prompts: int32 ids of each.
        settings: of `evaluate.generate`.
        seed: numbers that the draws of sampling depend on.
    """
    import torch
    import torch.distributed as dist

    whole = bool(model.config.is_encoder_decoder)
    pad = pad_right if whole else pad_left
    ids, mask = pad(prompts, pad_id), pad([np.ones(len(one)) for one in prompts], 0)
    device = model.device
    inputs = {"input_ids": torch.from_numpy(ids).to(device), "attention_mask": torch.from_numpy(mask).to(device)}
    torch.manual_seed(int(np.random.SeedSequence(list(seed)).generate_state(1)[0]))
    is_sharded = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    room = table_positions(model)
    if room is not None:  # what is said last has no position: nothing reads it
        most = max(room - (1 if whole else ids.shape[1]) + 1, 1)
        settings = {**settings, "max_new_tokens": min(settings["max_new_tokens"], most)}
    with torch.no_grad():
        arguments = _arguments(settings, tokenizer.eos_token_id, pad_id, model)
        found = model.generate(**inputs, **arguments, synced_gpus=is_sharded and dist.get_world_size() > 1)
    said = found if whole else found[:, ids.shape[1] :]
    texts: list[str] = tokenizer.batch_decode(said, skip_special_tokens=True)
    return texts


def _arguments(settings: Mapping[str, Any], eos_id: int | None, pad_id: int, model: Any) -> dict[str, Any]:
    """Arguments of generate; those of sampling only where it samples, for transformers warns of the others."""
    sampling = ("temperature", "top_p", "top_k")
    chosen = {name: value for name, value in settings.items() if settings["do_sample"] or name not in sampling}
    if settings["num_beams"] == 1:
        chosen.pop("length_penalty")
    own_eos = getattr(model.generation_config, "eos_token_id", None)
    return {**chosen, "pad_token_id": pad_id, "eos_token_id": eos_id if own_eos is None else own_eos}
