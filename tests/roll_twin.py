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


class RollCache:
    """Frame-granular bookkeeping of the published code; `grid` is the token height and width of a frame."""

    def __init__(self, config: CacheConfig, num_layers: int, grid: tuple[int, int], head_dim: int) -> None:
        assert config.window_frames != -1
        self.config, self.grid, self.head_dim = config, grid, head_dim
        self.k: list[Tensor | None] = [None] * num_layers
        self.v: list[Tensor | None] = [None] * num_layers
        self.global_end = self.local_end = self.sink_shift = 0

    def zero_(self) -> None:
        self.k = [None if k is None else torch.zeros_like(k) for k in self.k]
        self.v = [None if v is None else torch.zeros_like(v) for v in self.v]

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

    def update(self, layer: int, raw_k: Tensor, k: Tensor, v: Tensor, plan: RollPlan) -> tuple[Tensor, Tensor]:
        stored = raw_k if self.config.relative else k
        num, tokens = len(plan.frames), stored.shape[2] // len(plan.frames)
        sink, window = self.config.sink_frames, self.config.window_frames
        if self.k[layer] is None:
            empty = stored.new_zeros(*stored.shape[:2], window * tokens, stored.shape[3])
            self.k[layer], self.v[layer] = empty, empty.clone()
        old_k, old_v = self.k[layer], self.v[layer]
        assert old_k is not None and old_v is not None
        self.k[layer] = buffer_k = self._write(old_k, stored, plan, num, tokens)
        self.v[layer] = buffer_v = self._write(old_v, v, plan, num, tokens)
        if self.config.relative:
            table = rope_table(torch.arange(window), *self.grid, self.head_dim)
            buffer_k = apply_rope(buffer_k, table)
        newest = slice(max(sink, plan.local_end - (window - sink)) * tokens, plan.local_end * tokens)
        see = [torch.cat([b[:, :, : sink * tokens], b[:, :, newest]], dim=2) for b in (buffer_k, buffer_v)]
        return see[0], see[1]

    def _write(self, buffer: Tensor, new: Tensor, plan: RollPlan, num: int, tokens: int) -> Tensor:
        sink = self.config.sink_frames * tokens
        evicted = plan.roll * tokens
        rolled = torch.cat([buffer[:, :, :sink], buffer[:, :, sink + evicted :], buffer[:, :, :evicted]], dim=2)
        skip = plan.write_start - (plan.local_end - num)
        rolled[:, :, plan.write_start * tokens : plan.local_end * tokens] = new[:, :, skip * tokens :]
        return rolled
