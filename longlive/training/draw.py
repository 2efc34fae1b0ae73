"""Random numbers as pure functions of where training is, so that there is no random state to keep.

A number depends on the seed, on what it is for, and on the sample it belongs to, counted over all processes since the
start of training. A resumed run therefore draws what the uninterrupted one would have drawn, and two processes with one
sample each draw what one process with two samples draws; up to rounding on every kind of device.

Numbers are made by counting: the n-th bits of a stream are the hash of its key plus n steps (SplitMix64, Steele, Lea
and Flood 2014). A sample's key is drawn in the same way from the key of the purpose, so that nothing is done sample by
sample.
"""

import hashlib
import math
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_MOST = 2**63 - 1
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as int64
_MIXING = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


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

    def split(self, num: int) -> "Draw":
        """The numbers of `num` samples in the place of each."""
        return replace(
            self.of("split"),
            position=num * self.position,
            num_samples=num * self.num_samples,
            offset=num * self.offset,
            batch_size=num * self.batch_size,
        )

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
        """Standard normal numbers [B, *shape] float32 (Box and Muller 1958)."""
        bits = self._bits(*shape)
        radius = ((bits >> 32 & 0xFFFFFFFF).float() + 0.5).mul_(2.0**-32).log_().mul_(-2).clamp_(min=0).sqrt_()
        return radius * (bits & 0xFFFFFFFF).float().mul_(2 * math.pi * 2.0**-32).cos_()

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers [B, *shape] float32 in [0, 1)."""
        return (self._bits(*shape) >> 40 & 0xFFFFFF).float() * 2.0**-24

    def integers(self, end: int, *shape: int) -> Tensor:
        """Uniform whole numbers [B, *shape] int64 in [0, end)."""
        return (self._bits(*shape) >> 1 & _MOST) % end

    def _bits(self, *shape: int) -> Tensor:
        """64 random bits each, [B, *shape] int64."""
        samples = torch.arange(self.samples.start, self.samples.stop, device=self.device)
        keys = _hashed(derived_seed(self.seed, self.purpose) + samples * _GOLDEN)
        count = torch.arange(1, math.prod(shape) + 1, device=self.device)
        return _hashed(keys[:, None] + count * _GOLDEN).view(self.batch_size, *shape)


def _hashed(bits: Tensor) -> Tensor:
    """64 bits of each, int64, mixed so that neighbours have nothing in common."""
    for shift, factor in _MIXING:
        bits = (bits ^ (bits >> shift & _MOST >> shift - 1)) * factor
    return bits ^ (bits >> 31 & _MOST >> 30)


@dataclass(frozen=True)
class Pictures:
    """Steps on pictures among those on clips. share: of the steps; per_clip: how many pictures, the first frames of
    other clips, take the place of a clip."""

    share: float = 0.0
    per_clip: int = 1

    def choose(self, draw: Draw) -> tuple[Draw, bool]:
        """The random numbers of a step's samples, and whether they are pictures."""
        if draw.of("picture").shared.random() >= self.share:
            return draw, False
        return draw.split(self.per_clip), True
