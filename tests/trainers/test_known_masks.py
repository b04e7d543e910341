"""Masks are the same whether transformers asks the device what is masked or is told."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, masking_utils

from trainers.known_masks import MaskFacts, masks_known

WHOLE, PADDED = [[1] * 6, [1] * 6], [[1] * 6, [1] * 4 + [0] * 2]
SINGLE, RESTARTING = [list(range(6)), list(range(6))], [[0, 1, 2, 0, 1, 2], list(range(6))]
MAKERS: dict[str, Any] = {
    "causal": (masking_utils.create_causal_mask, LlamaConfig()),
    "bidirectional": (masking_utils.create_bidirectional_mask, LlamaConfig()),
    "window": (masking_utils.create_sliding_window_causal_mask, MistralConfig(sliding_window=3)),
}


@pytest.mark.parametrize("backend", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    ("mask", "positions"),
    [(WHOLE, None), (PADDED, None), (None, SINGLE), (None, RESTARTING), (WHOLE, SINGLE), (PADDED, SINGLE)],
)
def test_a_mask_is_the_same_asked_or_told(name: str, backend: str, mask: Any, positions: Any) -> None:
    make, config = MAKERS[name]
    config._attn_implementation = backend
    given = {} if name == "bidirectional" else {"position_ids": None if positions is None else torch.tensor(positions)}
    arguments = {"config": config, "inputs_embeds": torch.zeros(2, 6, 8), "past_key_values": None, **given,
                 "attention_mask": None if mask is None else torch.tensor(mask)}  # fmt: skip
    asked = make(**arguments)
    with masks_known(MaskFacts(padded=mask is PADDED, restarts=positions is RESTARTING)):
        told = make(**arguments)
    assert (told is None) == (asked is None)
    assert told is None or told.equal(asked)
