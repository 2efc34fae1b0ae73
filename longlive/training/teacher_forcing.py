"""Teacher forcing: one pass in which every block is denoised given the clean frames before it.

The way from a bidirectional to a causal model (CausVid, arXiv 2412.07772; Self-Forcing, arXiv 2506.08009). The clip
passes through the model twice side by side: clean frames, which see what the cache's clean pass would see, and noisy
ones, which see their own block and the clean past in the cache's window and sink. So the model is trained on exactly
what a rollout with this past would show it. Where positions are relative, the sink's keys are turned for every block.

Shapes: F frames of S tokens, clean then noisy: T = 2 F S tokens.
"""

import torch
from torch import Tensor, nn

from longlive.models.attention import AttentionFn, View, attend_views
from longlive.models.dit import WanDiT
from longlive.models.kv_cache import CacheConfig, sink_turns


class TeacherForced(nn.Module):
    """A model whose pass over clean and noisy frames is one `forward`."""

    def __init__(
        self,
        model: WanDiT,
        cache: CacheConfig,
        frames_per_block: int,
        context_timestep: float,
        attention: AttentionFn,
    ) -> None:
        """context_timestep: that of the clean pass; attention: the kernel."""
        super().__init__()
        self.model = model
        self.cache = cache
        self.frames_per_block = frames_per_block
        self.context_timestep = context_timestep
        self.attention = attention

    def forward(self, noisy: Tensor, clean: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """The flow of noisy frames [B, F, C, height, width] at timesteps [B, F], given clean ones of that shape, which
        are the past, and prompts [B, L, text_dim]."""
        num_frames = noisy.shape[1]
        frames = torch.arange(num_frames, device=noisy.device)
        flow: Tensor = self.model(
            torch.cat([clean, noisy], dim=1),
            torch.cat([torch.full_like(timesteps, self.context_timestep), timesteps], dim=1),
            text,
            frames=torch.cat([frames, frames]),
            attention=teacher_forcing(
                num_frames,
                self.frames_per_block,
                self.cache,
                self.attention,
                self.model.config.head_dim,
                noisy.device,
            ),
        )
        return flow[:, num_frames:]


def teacher_forcing(
    num_frames: int,
    frames_per_block: int,
    cache: CacheConfig,
    attention: AttentionFn,
    head_dim: int,
    device: torch.device,
) -> AttentionFn:
    """Attention over clean and noisy frames: a call for each block, on the keys it sees, and so without any mask."""
    starts = range(0, num_frames, frames_per_block)
    turns = sink_turns([start + frames_per_block for start in starts], 0, cache, head_dim, device)
    views = []
    for half in (0, num_frames):  # clean, noisy
        for start, turn in zip(starts, turns, strict=True):
            end = start + frames_per_block
            num_sink, oldest = cache.past_seen(start, end)
            own = range(half + start, half + end)
            views.append(View(own, (range(num_sink), range(oldest, start), own), turn))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [B, H, T, D] -> [B, H, T, D]."""
        return attend_views(attention, q, k, v, views, q.shape[2] // (2 * num_frames))

    return attend
