"""How long the parts of a training step take, without waiting for the device."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spans:
    """Named parts with their beginnings and ends: points in the device's work, or seconds."""

    spans: list[tuple[str, torch.cuda.Event | float, torch.cuda.Event | float]]

    def seconds(self) -> dict[str, float]:
        """Seconds of every part, those of one name added up; waits until the device has done them all."""
        seconds: dict[str, float] = {}
        for name, start, end in self.spans:
            if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
                end.synchronize()
                elapsed = start.elapsed_time(end) / 1000
            else:
                elapsed = float(end) - float(start)  # type: ignore[arg-type]
            seconds[name] = seconds.get(name, 0.0) + elapsed
        return seconds


class Clock:
    """Notes the time spent in named parts."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spans: list[tuple[str, torch.cuda.Event | float, torch.cuda.Event | float]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is done inside belongs to part `name`; on a GPU, what is queued inside."""
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    def take(self) -> Spans:
        """The parts since the last call."""
        spans, self._spans = Spans(self._spans), []
        return spans

    def _now(self) -> torch.cuda.Event | float:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
