"""How long the parts of a training step take, without making the device wait."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Adds up the time spent in named parts since the last reading."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spans: list[tuple[str, torch.cuda.Event | float, torch.cuda.Event | float]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is done inside belongs to part `name`; on a GPU, what is queued inside."""
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds of every part since the last call; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds: dict[str, float] = {}
        for name, start, end in self._spans:
            if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
                elapsed = start.elapsed_time(end) / 1000
            else:
                elapsed = float(end) - float(start)  # type: ignore[arg-type]
            seconds[name] = seconds.get(name, 0.0) + elapsed
        self._spans.clear()
        return seconds

    def _now(self) -> torch.cuda.Event | float:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
