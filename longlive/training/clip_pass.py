"""The exit steps of all blocks of a clip in one pass with gradient.

A rollout denoises block by block, and in Self-Forcing (arXiv 2506.08009) the last step of each block has a gradient,
none through the cache. So these steps do not depend on each other: once the rollout is over, without any gradient,
they can be made again all together, each block seeing the past that the cache kept for it. That is one pass over the
weights instead of one for each block, for one more forward pass over the clip.

Where positions are relative to the window, each block has seen the sink at another distance. The keys of the sink lie
in the cache as the last block saw them; they are turned back, in time alone, to where each block saw them.

Shapes: F frames of S tokens, P tokens of the past.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from longlive.flow import flow_to_x0
from longlive.models.attention import AttentionFn, View, attend_views
from longlive.models.dit import WanDiT
from longlive.models.kv_cache import CacheConfig, CachePlan, KVCache
from longlive.models.rope import rope_table
from longlive.rollout import ExitStep


class ClipPass:
    """The passes with gradient of a network over clips whose blocks have been rolled out."""

    def __init__(
        self,
        model: WanDiT,
        frames_per_block: int,
        attention: AttentionFn,
        graphed: Callable[[nn.Module], Callable[..., Tensor]] = lambda module: module,
    ) -> None:
        """attention: the kernel; graphed: gives what calls a module, which may be the module or its calls replayed."""
        self.model = model
        self.frames_per_block = frames_per_block
        self.attention = attention
        self._graphed = graphed
        self._cache: KVCache | None = None
        self._calls: dict[tuple[int, int], Callable[..., Tensor]] = {}

    def __call__(self, exits: Sequence[ExitStep], prompt_embeds: Tensor, cache: KVCache, start_frame: int) -> Tensor:
        """x0 [B, F, C, height, width] of the blocks that these exit steps end, the first of which starts at a frame.

        prompt_embeds [B, L, text_dim]: the prompt of all of them. The cache is as the rollout left it, and must not
        change before the backward pass; one that grows would leave replayed calls behind.
        """
        if cache is not self._cache:
            self._cache, self._calls = cache, {}
        noisy = torch.cat([step.xt for step in exits], dim=1)
        plan = cache.plan_clip_gradient(start_frame, noisy.shape[1], self.frames_per_block)
        assert plan.past is not None
        assert plan.sink_shift == cache.sink_shift, "the rollout has not ended with the clip"
        flow = self._call(cache, start_frame, noisy.shape[1])(
            noisy, self._per_frame([step.timestep for step in exits], noisy), prompt_embeds, plan.frames, plan.past
        )
        sigmas = self._per_frame([step.sigma for step in exits], noisy)
        return flow_to_x0(flow, noisy, sigmas[..., None, None, None])

    def _per_frame(self, values: Sequence[float], noisy: Tensor) -> Tensor:
        """A value of every block as [B, F]."""
        column = torch.tensor(values, dtype=torch.float32).repeat_interleave(self.frames_per_block)
        return column.to(noisy.device, non_blocking=True).expand(noisy.shape[0], -1)

    def _call(self, cache: KVCache, start_frame: int, num_frames: int) -> Callable[..., Tensor]:
        """What passes over a clip of this length: past the window, all starts see the same number of frames, and the
        sink from as far."""
        window = cache.config.window_frames
        key = (start_frame if window == -1 else min(start_frame, window), num_frames)
        if key not in self._calls:
            head_dim, shift = self.model.config.head_dim, cache.config.sink_shift(sum(key))
            attention = clip_attention(
                *key, self.frames_per_block, cache.config, self.attention, head_dim, cache.device, shift
            )
            self._calls[key] = self._graphed(_Pass(self.model, cache, attention))
        return self._calls[key]


class _Pass(nn.Module):
    """One call on tensors alone, through a cache that stays where it is in memory."""

    def __init__(self, model: WanDiT, cache: KVCache, attention: AttentionFn) -> None:
        super().__init__()
        self.model = model
        self.cache = cache
        self.attention = attention

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Tensor, frames: Tensor, past: Tensor) -> Tensor:
        """The flow of noisy [B, F, C, height, width] at timesteps [B, F] and positions [F]; past [P]: tokens seen."""
        shift = self.cache.sink_shift
        plan = CachePlan(frames, past[:0], num_skipped=0, num_sink_tokens=0, visible=0, sink_shift=shift, past=past)
        flow: Tensor = self.model(noisy, timesteps, text, cache=self.cache, plan=plan, attention=self.attention)
        return flow


def clip_attention(
    start_frame: int,
    num_frames: int,
    frames_per_block: int,
    cache: CacheConfig,
    attention: AttentionFn,
    head_dim: int,
    device: torch.device,
    sink_shift: int,
) -> AttentionFn:
    """Attention of a clip's blocks, to keys of the past as `KVCache.plan_clip_gradient` orders them, then their own.

    A call for each block, on the keys it sees, and so without any mask. sink_shift: by how much the sink's keys have
    been moved.
    """
    num_sink, oldest = cache.clip_past(start_frame, num_frames, frames_per_block)
    last_start = start_frame + num_frames - frames_per_block
    num_past = num_sink + max(last_start - oldest, 0)
    starts = range(start_frame, start_frame + num_frames, frames_per_block)
    ends = [start + frames_per_block for start in starts]
    turns = _sink_turns(ends, sink_shift, cache, head_dim, device)
    views = []
    for start, end, turn in zip(starts, ends, turns, strict=True):
        num_seen, first = cache.past_seen(start, end)
        queries = range(start - start_frame, end - start_frame)
        own = range(num_past + queries.start, num_past + queries.stop)
        newest = range(*(num_sink + max(frame - oldest, 0) for frame in (first, start)))
        views.append(View(queries, (range(num_seen), newest, own), turn))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, H, F S, D], k and v [B, H, P + F S, D] -> [B, H, F S, D]."""
        return attend_views(attention, q, k, v, views, q.shape[2] // num_frames)

    return attend


def _sink_turns(
    ends: Sequence[int], shift: int, config: CacheConfig, head_dim: int, device: torch.device
) -> list[Tensor | None]:
    """For passes that end before these frames, the RoPE [2, 1, D / 2] from a sink moved by `shift` to where they see
    it; None where that is the same."""
    away = [config.sink_shift(end) - shift for end in ends]
    return [rope_table(torch.full((1,), frames, device=device), 1, 1, head_dim) if frames else None for frames in away]
