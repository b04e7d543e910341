"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to the peak, then decay to zero after the last step."""

    kind: Literal["cosine", "linear", "constant"]
    peak: float
    steps: int
    warmup_ratio: float

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up, rounded up."""
        return math.ceil(self.steps * self.warmup_ratio)

    def rate(self, step: int) -> float:
        """Learning rate of the update that step `step` (counted from 0) makes.

        The first update has rate peak / warmup_steps, not zero; otherwise as transformers' schedules of these names.
        """
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        progress = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        if self.kind == "linear":
            return self.peak * max(1.0 - progress, 0.0)
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
