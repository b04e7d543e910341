"""Before the first step of sequences that ranks share: does the model say the same of them as of whole ones?"""

from typing import Any

import numpy as np
import torch

from trainers.architecture.sequence_parallel import SequenceGroup
from trainers.errors import TrainingError
from trainers.shards.dataset import ShardSet
from trainers.tasks import Task
from trainers.verification.isolation import ALIKE, evaluating, shared_states_of, short_rows, states_of


def check_shared(
    engine: Any, task: Task, shards: ShardSet, pad_id: int, dtype: str, device: Any, group: SequenceGroup
) -> None:
    """Send known values through the exchange; then run the shortest rows that have targets, whole on every rank and
    shared, and compare what the model makes of them and their loss. Every rank calls this with the same shards.

    Raises:
        TrainingError: where they differ.
    """
    check_exchange(group, device)
    lengths = np.where(shards.targets > 0, shards.lengths, shards.lengths.max() + 1)
    batch = task.collate([short_rows(shards, lengths)], pad_id)
    with evaluating(engine), torch.no_grad():
        whole = states_of(engine, task, batch, device)
        shared = shared_states_of(engine, task, batch, device, group)
        real = torch.from_numpy(batch.segments >= 0) if batch.segments is not None else ...
        moved = float((shared - whole)[real].abs().max() / whole[real].abs().max().clamp_min(1e-30))
        one, part = (
            float(task.step_loss(engine, *each.to(device), each.targets(device)))
            for each in (batch, batch.part_of(group))
        )
    together = sum(group.gather(part))
    apart = abs(together - one) / max(abs(one), 1e-30)
    if max(moved, apart) > ALIKE[dtype]:
        raise TrainingError(
            f"train.sequence_parallel: {group.size} ranks that share a sequence compute something else than one that "
            f"has it whole: hidden states differ by {moved:.3g} of the largest, the loss is {together:.6g} and not "
            f"{one:.6g}. This model is not known to work so; leave train.sequence_parallel out"
        )


def check_exchange(group: SequenceGroup, device: Any) -> None:
    """See that each rank gets its heads of all positions and its positions of all heads, to the bit. A model with small
    weights, or in bf16, would hardly show it. Raises TrainingError."""
    heads, positions = 2 * group.size, 3 * group.size
    whole = torch.arange(heads * positions, dtype=torch.float32, device=device).view(1, heads, positions, 1)
    own = whole[:, :, 3 * group.place : 3 * group.place + 3]
    of_heads = group.own_heads(own)
    right = of_heads.equal(whole[:, 2 * group.place : 2 * group.place + 2])
    if not (right and group.own_positions(of_heads.transpose(1, 2)).equal(own.transpose(1, 2))):
        raise TrainingError(
            f"train.sequence_parallel: heads and positions that {group.size} ranks exchange come out in a wrong order; "
            "leave train.sequence_parallel out, and look for an error in the communication library"
        )
