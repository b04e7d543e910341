"""What the other programs do where their file says nothing. Begin at `assume`."""

import json
from collections.abc import Mapping
from typing import Any

from orchestrator.importing.draft import Draft

Defaults = Mapping[str, tuple[str, Any]]
"""By their key: our field and the value that stands for its absence there."""

LLAMAFACTORY: Defaults = {
    "cutoff_len": ("data.max_length", 2048),
    "packing": ("data.packing", False),
    "num_train_epochs": ("train.epochs", 3.0),
    "learning_rate": ("train.learning_rate", 5e-5),
    "lr_scheduler_type": ("train.schedule", "linear"),
    "warmup_ratio": ("train.warmup_ratio", 0.0),
    "weight_decay": ("train.weight_decay", 0.0),
    "max_grad_norm": ("train.max_grad_norm", 1.0),
    "lora_rank": ("model.lora.rank", 8),
    "lora_dropout": ("model.lora.dropout", 0.0),
    "lora_target": ("model.lora.target_modules", ["all-linear"]),
}
"""Of src/llamafactory/hparams, and of transformers' TrainingArguments below them."""

AXOLOTL: Defaults = {
    "sequence_len": ("data.max_length", 512),
    "sample_packing": ("data.packing", False),
    "num_epochs": ("train.epochs", 1.0),
    "lr_scheduler": ("train.schedule", "cosine"),
    "warmup_ratio": ("train.warmup_ratio", 0.03),
    "weight_decay": ("train.weight_decay", 0.0),
    "max_grad_norm": ("train.max_grad_norm", 1.0),
    "lora_dropout": ("model.lora.dropout", 0.0),
}
"""Of src/axolotl/utils/schemas, of the trainer's builder, and of TrainingArguments below them."""

ABSENT = "keys left out"
"""Under this word stands what is said of keys that the file does not have."""
KEPT = ("model.dtype", "train.seed", "train.spike_factor")
"""Fields that stay as they are here, which may show in the trained model."""


def assume(draft: Draft, defaults: Defaults) -> None:
    """Give the fields whose keys the file leaves out the values that the other program takes then."""
    for key, (place, value) in defaults.items():
        if draft.source.get(key) is None and draft.get(place) is None:
            draft.set(place, value)
            draft.assumed[place] = value


def tell_assumed(draft: Draft, program: str) -> None:
    """Say which values of the job come from no key, and whose they are."""
    taken = [f"{place} {json.dumps(one)}" for place, one in draft.assumed.items() if draft.get(place) == one]
    kept = [place for place in KEPT if draft.get(place) is None]
    draft.told[ABSENT] = "; ".join(
        [
            *([f"as {program} has it: {', '.join(taken)}"] if taken else []),
            *([f"as here: {', '.join(kept)}"] if kept else []),
            "checkpoints are evaluated, and the best is the result, not the last",
        ]
    )
