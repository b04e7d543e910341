"""Where the time of a few steps goes, by torch's profiler on rank 0: kernels, gaps between them, waits of the host.

`Profiled` stands around a rank's hooks. The trace opens in ui.perfetto.dev or chrome://tracing.
"""

import time
from pathlib import Path
from typing import Any

from trainers.model.world import World
from trainers.records import Phase, StopReason
from trainers.run.events import Event, ProfileEvent
from trainers.training.hooks import Hooks

WARM_UP, STEPS = 3, 3
"""Steps that pass before it begins, where the run has so many, and steps that are looked at."""
SHOWN = 12
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12}
"""Dense bf16 peak by a part of the card's name, from NVIDIA's data sheets."""


class Profiled:
    """Hooks that look at a few steps on the way.

    Args:
        folder: where the trace goes.
        begin, end: steps done when the training begins, and in the end.
    """

    def __init__(self, hooks: Hooks, folder: Path, engine: Any, world: World, begin: int, end: int) -> None:
        self._hooks, self._folder, self._engine, self._world = hooks, folder, engine, world
        self._first = begin + (WARM_UP if end - begin >= WARM_UP + STEPS else 0)
        self._last = min(self._first + STEPS, end)
        self._steps = self._last - self._first
        self._profile: Any = None
        self._began, self._tokens = 0.0, [0, 0]

    def emit(self, event: Event) -> None:
        self._hooks.emit(event)
        if event.kind == "step":
            self._tokens = [self._tokens[0] if self._profile else event.tokens, event.tokens]

    def stop_reason(self) -> StopReason | None:
        return self._hooks.stop_reason()

    def at(self, phase: Phase, step: int) -> None:
        self._hooks.at(phase, step)
        if phase == "data" and step == self._first and self._profile is None:
            self._start()
        elif phase in ("data", "save", "done") and step >= self._last and self._profile is not None:
            self._finish()

    def _start(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_card else [])]
        self._wait()
        self._profile = profile(activities=activities)
        self._profile.start()
        self._began = time.perf_counter()

    def _finish(self) -> None:
        self._wait()
        seconds = time.perf_counter() - self._began
        found, self._profile = self._profile, None
        self._first = -1  # once a launch
        found.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / f"steps-{self._last - self._steps + 1}-{self._last}.json.gz"
        found.export_chrome_trace(str(trace))
        tokens_per_s = (self._tokens[1] - self._tokens[0]) / seconds
        self._hooks.emit(self._summary(found.key_averages(), seconds, tokens_per_s, trace))

    def _summary(self, rows: Any, seconds: float, tokens_per_s: float, trace: Path) -> ProfileEvent:
        steps, key = self._steps, "self_device_time_total" if self._on_card else "self_cpu_time_total"
        of_device = [row for row in rows if row.device_type.name != "CPU" and not row.is_user_annotation]
        operators = [row for row in rows if row.device_type.name == "CPU" and row.key not in WAITS]
        operators = sorted(operators, key=lambda row: -getattr(row, key))[:SHOWN]
        return ProfileEvent(
            step=self._last,
            step_s=seconds / steps,
            busy_s=sum(row.self_device_time_total for row in of_device) / 1e6 / steps if self._on_card else None,
            waits=round(sum(row.count for row in rows if row.key in WAITS) / steps) if self._on_card else None,
            tokens_per_s=tokens_per_s,
            mfu=self._use(tokens_per_s),
            operators=tuple((row.key, getattr(row, key) / 1e6 / steps, round(row.count / steps)) for row in operators),
            trace=str(trace),
        )

    @property
    def _on_card(self) -> bool:
        return bool(self._world.device.type == "cuda")

    def _wait(self) -> None:
        """Until the card has done what it was given."""
        import torch

        if self._on_card:
            torch.cuda.synchronize()

    def _use(self, tokens_per_s: float) -> float | None:
        """Share of the cards' peak, at 6 operations a parameter and token; None where the peak is not known."""
        import torch

        name = torch.cuda.get_device_name(self._world.device) if self._on_card else ""
        peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
        parameters = sum(getattr(each, "ds_numel", each.numel()) for each in self._engine.parameters())
        return 6 * parameters * tokens_per_s / (peak * self._world.size) if peak else None
