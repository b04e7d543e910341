"""Small types that several rooms share."""

from typing import Any, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict

Phase = Literal["start", "load", "data", "step", "settle", "save", "evaluate", "commit", "done"]
"""start: imports. load: joining, data index, model, resuming. data: waiting for a batch. step: forward, backward,
update. settle: agreeing on the loss. save: copying the state, and waiting a while for the commit of the one before.
evaluate: scoring a batch of the evaluation set. commit: waiting for the last save's, at the end and before rolling
back."""


PHASES: tuple[Phase, ...] = get_args(Phase)


StopReason = Literal["preempted", "early_stopping", "resize", "paused"]


STOPS: tuple[StopReason, ...] = get_args(StopReason)


Array = np.ndarray[Any, np.dtype[Any]]


class Record(BaseModel):
    """Base of the records that stages leave behind as JSON: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")
