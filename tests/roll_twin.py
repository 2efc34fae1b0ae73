"""The published cache, literally: a buffer that rolls (README of the golden fixtures, sections 3 to 5).

A plain twin of `KVCache` with the same signature. Slow and plain on purpose: the buffer is a tensor that is
concatenated, indices follow the published rules step by step, and with `relative` the whole buffer is rotated anew in
every call.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from longlive.models.kv_cache import CacheConfig
from longlive.models.rope import apply_rope, rope_table


@dataclass
class RollPlan:
    frames: Tensor
    roll: int
    write_start: int
    local_end: int
    sink_recache: bool
    is_recompute: bool
    sink_shift: int = 0
    past: None = None


class RollCache:
    """Frame-granular bookkeeping of the published code; `grid` is the token height and width of a frame."""

    def __init__(self, config: CacheConfig, num_layers: int, grid: tuple[int, int], head_dim: int) -> None:
        assert config.window_frames != -1
        self.config, self.grid, self.head_dim = config, grid, head_dim
        self.layers = [RollLayer(self) for _ in range(num_layers)]
        self.global_end = self.local_end = self.sink_shift = 0

    def zero_(self) -> None:
        for layer in self.layers:
            layer.k, layer.v = torch.zeros_like(layer.k), torch.zeros_like(layer.v)

    def begin(self, start: int, num: int, sink_recache: bool = False) -> RollPlan:
        """Plan a call on frames [start, start + num) and move the indices as the published code does after it."""
        end, size = start + num, self.config.window_frames
        recompute = end <= self.global_end and start > 0
        roll = 0
        if end > self.global_end and num + self.local_end > size:
            roll = num + self.local_end - size
        local_end = self.local_end + end - self.global_end - roll
        if not recompute:
            self.global_end, self.local_end = end, local_end
        first = local_end - num
        frames = torch.arange(first, local_end) if self.config.relative else torch.arange(start, end)
        write = max(first, self.config.sink_frames) if recompute and not sink_recache else first
        return RollPlan(frames, roll, write, local_end, sink_recache, recompute)


class RollLayer:
    """One layer's buffers [B, H, window * tokens, D], replaced by new ones in every call."""

    def __init__(self, cache: RollCache) -> None:
        self.cache = cache
        self.k = self.v = torch.zeros(0)

    def update(self, raw_k: Tensor, k: Tensor, v: Tensor, plan: RollPlan) -> tuple[Tensor, Tensor]:
        config = self.cache.config
        stored = raw_k if config.relative else k
        tokens = stored.shape[2] // len(plan.frames)
        sink, window = config.sink_frames, config.window_frames
        if self.k.numel() == 0:
            self.k = stored.new_zeros(*stored.shape[:2], window * tokens, stored.shape[3])
            self.v = self.k.clone()
        self.k, self.v = self._write(self.k, stored, plan, tokens), self._write(self.v, v, plan, tokens)
        keys = self.k
        if config.relative:
            keys = apply_rope(keys, rope_table(torch.arange(window), *self.cache.grid, self.cache.head_dim))
        newest = slice(max(sink, plan.local_end - (window - sink)) * tokens, plan.local_end * tokens)
        see = [torch.cat([b[:, :, : sink * tokens], b[:, :, newest]], dim=2) for b in (keys, self.v)]
        return see[0], see[1]

    def _write(self, buffer: Tensor, new: Tensor, plan: RollPlan, tokens: int) -> Tensor:
        sink, evicted = self.cache.config.sink_frames * tokens, plan.roll * tokens
        rolled = torch.cat([buffer[:, :, :sink], buffer[:, :, sink + evicted :], buffer[:, :, :evicted]], dim=2)
        skip = plan.write_start - (plan.local_end - len(plan.frames))
        rolled[:, :, plan.write_start * tokens : plan.local_end * tokens] = new[:, :, skip * tokens :]
        return rolled
