"""What a rank needs of memory, by the way the state is kept. Pure; begin at `needs`.

`shape` has what a micro-batch brings, `held` what stays beside it, `beyond` the same where state is offloaded, `need`
the sum at the fullest moment of a step. Sizes come from `model_size`.
"""

from trainers.model.memory.beyond import DISK_GROUPS, DISK_SUB_GROUP_ELEMENTS, DISK_WEIGHTS
from trainers.model.memory.need import (
    CPU_IMPORT_BYTES,
    CPU_RESERVE_BYTES,
    GIB,
    GIVE_BACK_BYTES,
    MARGIN,
    RESERVE_BYTES,
    Need,
    needs,
)
from trainers.model.memory.shape import ModelSize, StepShape

__all__ = [
    "CPU_IMPORT_BYTES",
    "CPU_RESERVE_BYTES",
    "DISK_GROUPS",
    "DISK_SUB_GROUP_ELEMENTS",
    "DISK_WEIGHTS",
    "GIB",
    "GIVE_BACK_BYTES",
    "MARGIN",
    "RESERVE_BYTES",
    "ModelSize",
    "Need",
    "StepShape",
    "needs",
]
