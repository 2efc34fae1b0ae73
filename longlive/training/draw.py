"""Random numbers as pure functions of where training is, so that there is no random state to keep.

A number depends on the seed, on what it is for, and on the sample it belongs to, counted over all processes since the
start of training. A resumed run therefore draws what the uninterrupted one would have drawn, and two processes with one
sample each draw what one process with two samples draws. (On another kind of device the numbers are others.)
"""

import hashlib
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor


def derived_seed(*key: object) -> int:
    """A seed of 63 bits that follows from the key: numbers and texts."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8]) >> 1


@dataclass(frozen=True)
class Draw:
    """The random numbers of one micro-batch: B samples of this process, of a global batch.

    position: number of the global batch's first sample since the start of training; num_samples: of the global batch;
    offset: number of this process's first sample within it. purpose: what the numbers are for.
    """

    seed: int
    position: int
    num_samples: int
    offset: int
    batch_size: int
    device: torch.device
    purpose: str = ""

    def of(self, purpose: str) -> "Draw":
        """The same place, numbers for something else."""
        return replace(self, purpose=f"{self.purpose}/{purpose}")

    @property
    def samples(self) -> range:
        """Numbers of this process's samples."""
        first = self.position + self.offset
        return range(first, first + self.batch_size)

    @property
    def shared(self) -> random.Random:
        """A generator that is the same on every process."""
        return random.Random(derived_seed(self.seed, self.purpose, self.position))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers [B, *shape] float32."""
        return torch.stack([torch.randn(shape, generator=g, device=self.device) for g in self._generators()])

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers [B, *shape] float32 in [0, 1)."""
        return torch.stack([torch.rand(shape, generator=g, device=self.device) for g in self._generators()])

    def integers(self, end: int, *shape: int) -> Tensor:
        """Uniform whole numbers [B, *shape] int64 in [0, end)."""
        drawn = [torch.randint(end, shape, generator=g, device=self.device) for g in self._generators()]
        return torch.stack(drawn)

    def _generators(self) -> list[torch.Generator]:
        seeds = [derived_seed(self.seed, self.purpose, sample) for sample in self.samples]
        return [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
