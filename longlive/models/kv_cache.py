"""Keys and values of past frames: a fixed sink and a ring, written in place.

A pass over frames [start, end) sees the first `sink` frames and the newest `window - sink` frames, its own included
(LongLive, arXiv 2509.22622, short window + frame sink). Attention without a mask does not care about the order of
keys, so nothing is ever rolled, cloned or concatenated. Frame n lives in

    slot n                                 n <  sink
    slot sink + (n - sink) mod ring        n >= sink,   ring = capacity - sink

and while capacity == window the visible frames are simply the first min(end, window) slots. Which tokens a pass writes
and sees follows from `start` and `end` alone: Python integers, planned once per pass, no host synchronisation.

Positions. Keys are stored rotated at their absolute frame index. With `relative` (unlimited length, Infinity-RoPE,
arXiv 2511.20649) the cache is positioned by slot order: sink at 0..sink-1, then the ring. Only differences of
positions matter, so the ring stays as it is and the sink alone moves along, by `end - window`; its unrotated keys are
kept for that.

Shapes: B batch, H heads, D head_dim; one latent frame is `frame_tokens` tokens.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from longlive.models.rope import apply_rope

SinkWrite = Literal["fill", "keep", "rewrite"]


@dataclass(frozen=True)
class CacheConfig:
    """Geometry of the visible context, in latent frames.

    window_frames: how many frames a pass sees, its own included; -1 means all. sink_frames: how many of them are the
    first frames of the video. relative: positions within the window instead of within the video.
    published_sink_fill: for sinks longer than a block, what the published code does: frames of later blocks enter the
    sink by the first, noisy pass only, and empty sink slots are attended as zeros.
    """

    window_frames: int = 12
    sink_frames: int = 3
    relative: bool = False
    published_sink_fill: bool = False

    def __post_init__(self) -> None:
        if self.sink_frames < 0:
            raise ValueError(f"sink_frames={self.sink_frames}: must not be negative")
        if self.window_frames != -1 and self.window_frames <= self.sink_frames:
            raise ValueError(
                f"window_frames={self.window_frames}: must exceed sink_frames={self.sink_frames}, or be -1"
            )

    def oldest_seen(self, end: int) -> int:
        """The oldest frame behind the sink that a pass which ends before frame `end` sees."""
        if self.window_frames == -1:
            return self.sink_frames
        return max(self.sink_frames, end - (self.window_frames - self.sink_frames))

    def sink_shift(self, end: int) -> int:
        """How far the sink's positions lie ahead of its frames' own, in a pass that ends before frame `end`."""
        moves = self.relative and self.sink_frames > 0 and self.window_frames != -1
        return max(0, end - self.window_frames) if moves else 0

    def past_seen(self, start: int, end: int) -> tuple[int, int]:
        """Of the frames before `start`, what a pass over [start, end) sees: the first so many, and all from the second
        number on."""
        return min(self.sink_frames, start), min(self.oldest_seen(end), start)

    def clip_past(self, start: int, num_frames: int, frames_per_block: int) -> tuple[int, int]:
        """What all blocks of a clip see before them: so many frames of the sink, and behind it all from the second
        number on."""
        return min(self.sink_frames, start + num_frames - frames_per_block), self.oldest_seen(start + frames_per_block)


@dataclass(frozen=True)
class CachePlan:
    """What one pass writes and sees.

    frames: [F] positions of the pass's frames; slots: [tokens] where its tokens go, after the first `num_skipped`
    tokens, which are not stored; num_sink_tokens: how many of those stored belong to the sink (they come first);
    visible: the tokens seen, as the length of a prefix or as indices; sink_shift: by how much the sink is moved;
    past: of a pass with gradient, the tokens seen besides its own; it stores nothing but what `slots` says of the sink.
    """

    frames: Tensor
    slots: Tensor
    num_skipped: int
    num_sink_tokens: int
    visible: int | Tensor
    sink_shift: int
    past: Tensor | None = None


@dataclass
class LayerCache:
    """Keys and values of one layer: k, v [B, H, slots * frame_tokens, D]; sink_k: the sink's unrotated keys, where the
    sink moves (else empty). A tensor is written in place, or replaced by a larger one."""

    k: Tensor
    v: Tensor
    sink_k: Tensor

    def for_gradient(self) -> "LayerCache":
        """The same memory for a pass with gradient, whose backward pass may read it again after others have written.

        What it reads is still there, see `KVCache.plan_gradient`; autograd cannot know, and is not told of the writes.
        """
        return LayerCache(self.k.data, self.v.data, self.sink_k.data)

    def update(self, raw_k: Tensor, k: Tensor, v: Tensor, plan: CachePlan) -> tuple[Tensor, Tensor]:
        """Store a pass's keys (unrotated, rotated) and values [B, H, tokens, D]; all it sees: [B, H, keys, D]."""
        if plan.past is not None:
            past_k, past_v = self.k.index_select(2, plan.past), self.v.index_select(2, plan.past)
            if plan.num_sink_tokens:
                self.k.index_copy_(2, plan.slots, k.detach()[:, :, : plan.num_sink_tokens])
                self.v.index_copy_(2, plan.slots, v.detach()[:, :, : plan.num_sink_tokens])
            own_k, own_v = k[:, :, plan.num_skipped :], v[:, :, plan.num_skipped :]
            return torch.cat([past_k, own_k], dim=2), torch.cat([past_v, own_v], dim=2)
        self.k.index_copy_(2, plan.slots, k[:, :, plan.num_skipped :])
        self.v.index_copy_(2, plan.slots, v[:, :, plan.num_skipped :])
        if self.sink_k.shape[2] and plan.num_sink_tokens:
            stored = slice(plan.num_skipped, plan.num_skipped + plan.num_sink_tokens)
            self.sink_k.index_copy_(2, plan.slots[: plan.num_sink_tokens], raw_k[:, :, stored])
        if isinstance(plan.visible, int):
            return self.k[:, :, : plan.visible], self.v[:, :, : plan.visible]
        return self.k.index_select(2, plan.visible), self.v.index_select(2, plan.visible)


class KVCache:
    """The cache of one generator and one batch of videos. `plan` a pass, hand both to the model."""

    def __init__(
        self,
        config: CacheConfig,
        *,
        num_layers: int,
        batch_size: int,
        num_heads: int,
        head_dim: int,
        frame_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str,
        capacity_frames: int | None = None,
    ) -> None:
        """capacity_frames: frames held; by default the window. With an unlimited window the cache grows as needed."""
        window = config.window_frames
        capacity = capacity_frames or (window if window != -1 else config.sink_frames + 1)
        assert window == -1 or capacity >= window, f"capacity {capacity} cannot hold a window of {window} frames"
        self.config = config
        self.frame_tokens = frame_tokens
        self.capacity_frames = capacity
        self.sink_shift = 0
        self.device = torch.device(device)

        def empty(num_frames: int) -> Tensor:
            return torch.zeros(batch_size, num_heads, num_frames * frame_tokens, head_dim, dtype=dtype, device=device)

        num_moving = config.sink_frames if config.relative else 0
        self.layers = [LayerCache(empty(capacity), empty(capacity), empty(num_moving)) for _ in range(num_layers)]

    def plan(self, start_frame: int, num_frames: int, sink: SinkWrite = "fill") -> CachePlan:
        """Plan a pass over frames [start_frame, start_frame + num_frames).

        sink: "fill" stores the video's first frames as the sink; "keep" leaves the sink untouched; "rewrite" makes the
        first frames of this pass the new sink.
        """
        num_sink, end = self.config.sink_frames, start_frame + num_frames
        if self.config.window_frames == -1:
            self._reserve(end)
        first = min(max(start_frame, num_sink), end) if sink == "keep" else start_frame
        num_sink_written = num_sink if sink == "rewrite" else max(0, min(num_sink, end) - first)
        frames = torch.arange(start_frame, end, device=self.device)
        slots = self._slots(frames[first - start_frame :])
        assert len(slots) - num_sink_written <= self.capacity_frames - num_sink, "the pass is longer than the ring"
        if sink == "rewrite":
            slots[:num_sink] = torch.arange(num_sink, device=slots.device)
        return CachePlan(
            frames=frames,
            slots=self._tokens(slots),
            num_skipped=(first - start_frame) * self.frame_tokens,
            num_sink_tokens=num_sink_written * self.frame_tokens,
            visible=self._visible(end),
            sink_shift=self.config.sink_shift(end),
        )

    def plan_block(self, start_frame: int, num_frames: int) -> tuple[CachePlan, CachePlan]:
        """Plans for the first and for the later passes over one block; they differ in `published_sink_fill` only."""
        first = self.plan(start_frame, num_frames)
        if not self.config.published_sink_fill or start_frame == 0:
            return first, first
        return first, self.plan(start_frame, num_frames, sink="keep")

    def plan_gradient(self, start_frame: int, num_frames: int, is_first: bool) -> CachePlan:
        """Plan a pass with gradient: it sees what `plan_block` would show it, and the past gets no gradient.

        is_first: whether it is the first pass over its block. It stores nothing, except, with `published_sink_fill`,
        what only a first pass stores. When activations are recomputed in the backward pass the past must still be
        there: the ring must hold the window and all frames that are made before that, and no sink may have moved.
        """
        end, num_sink = start_frame + num_frames, self.config.sink_frames
        published = self.config.published_sink_fill and start_frame > 0
        first = min(max(start_frame, num_sink), end) if published and not is_first else start_frame
        num_filled = max(0, min(num_sink, end) - start_frame) if published and is_first else 0
        sink = torch.arange(self._num_sink_seen(end), device=self.device)
        newest = torch.arange(self.config.past_seen(start_frame, end)[1], start_frame, device=self.device)
        seen = torch.cat([sink[(sink < first) | (sink >= end)], newest])
        frames = torch.arange(start_frame, end, device=self.device)
        return CachePlan(
            frames=frames,
            slots=self._tokens(self._slots(frames[:num_filled])),
            num_skipped=(first - start_frame) * self.frame_tokens,
            num_sink_tokens=num_filled * self.frame_tokens,
            visible=0,
            sink_shift=self.config.sink_shift(end),
            past=self._tokens(self._slots(seen)),
        )

    def plan_clip_gradient(self, start_frame: int, num_frames: int, frames_per_block: int) -> CachePlan:
        """Plan a pass with gradient over several blocks at once, which are in the cache by now, and their pasts too.

        It stores nothing. `past` is, in order of frames, the sink that the last block sees and all that any block sees
        behind it; which of these a block sees is for the attention to choose. The ring must hold them all.
        """
        assert not self.config.published_sink_fill, "what is in such a sink depends on when it is seen"
        end = start_frame + num_frames
        last_start = end - frames_per_block
        num_sink, oldest = self.config.clip_past(start_frame, num_frames, frames_per_block)
        held = end if self.config.window_frames == -1 else self.config.sink_frames + end - oldest
        assert held <= self.capacity_frames, f"a ring of {self.capacity_frames} frames has lost some of {held}"
        sink = torch.arange(num_sink, device=self.device)
        newest = torch.arange(min(oldest, last_start), last_start, device=self.device)
        return CachePlan(
            frames=torch.arange(start_frame, end, device=self.device),
            slots=sink[:0],
            num_skipped=0,
            num_sink_tokens=0,
            visible=0,
            sink_shift=self.config.sink_shift(end),
            past=self._tokens(self._slots(torch.cat([sink, newest]))),
        )

    def move_sink(self, table: Tensor, plan: CachePlan) -> None:
        """Rotate the sink's keys of every layer to the positions of `plan`, whose RoPE is `table`."""
        for layer in self.layers:
            layer.k[:, :, : layer.sink_k.shape[2]] = apply_rope(layer.sink_k, table)
        self.sink_shift = plan.sink_shift

    def zero_(self) -> None:
        """Forget everything: all keys and values become zero."""
        for layer in self.layers:
            for tensor in (layer.k, layer.v, layer.sink_k):
                tensor.zero_()
        self.sink_shift = 0

    def _reserve(self, num_frames: int) -> None:
        """Grow to hold `num_frames` frames (unlimited window), at least doubling."""
        if num_frames <= self.capacity_frames:
            return
        self.capacity_frames = max(num_frames, 2 * self.capacity_frames)
        for layer in self.layers:
            layer.k, layer.v = self._grown(layer.k), self._grown(layer.v)

    def _grown(self, old: Tensor) -> Tensor:
        batch, heads, tokens, dim = old.shape
        new = old.new_zeros(batch, heads, self.capacity_frames * self.frame_tokens, dim)
        new[:, :, :tokens] = old
        return new

    def _slots(self, frames: Tensor) -> Tensor:
        """Slot of each frame."""
        num_sink = self.config.sink_frames
        ring = num_sink + (frames - num_sink) % (self.capacity_frames - num_sink)
        return torch.where(frames < num_sink, frames, ring)

    def _tokens(self, slots: Tensor) -> Tensor:
        """Token indices of the given slots, in order."""
        offsets = torch.arange(self.frame_tokens, device=slots.device)
        return (slots[:, None] * self.frame_tokens + offsets).flatten()

    def _visible(self, end: int) -> int | Tensor:
        """Tokens seen by a pass that ends before frame `end`: a prefix, unless the ring is longer than the window."""
        window, num_sink_seen = self.config.window_frames, self._num_sink_seen(end)
        if window == -1 or window == self.capacity_frames:
            return max(end if window == -1 else min(end, window), num_sink_seen) * self.frame_tokens
        newest = torch.arange(self.config.oldest_seen(end), max(self.config.sink_frames, end), device=self.device)
        return self._tokens(torch.cat([torch.arange(num_sink_seen, device=self.device), self._slots(newest)]))

    def _num_sink_seen(self, end: int) -> int:
        """Frames of the sink seen by a pass that ends before frame `end`; the published code sees empty slots too."""
        num_sink = self.config.sink_frames
        return num_sink if self.config.published_sink_fill else min(num_sink, end)
