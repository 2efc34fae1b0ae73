"""Teacher forcing: one pass in which every block is denoised given the clean frames before it.

The way from a bidirectional to a causal model (CausVid, arXiv 2412.07772; Self-Forcing, arXiv 2506.08009). The clip
passes through the model twice side by side: clean frames, which see what the cache's clean pass would see, and noisy
ones, which see their own block and the clean past in the cache's window and sink. So the model is trained on exactly
what a rollout with this past would show it. Where positions are relative, the sink's keys are turned for every block.

Shapes: F frames of S tokens, clean then noisy: T = 2 F S tokens.
"""

import torch
from torch import Tensor, nn

from longlive.models.attention import AttentionFn
from longlive.models.dit import WanDiT
from longlive.models.kv_cache import CacheConfig
from longlive.training.clip_pass import clip_attention


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
            attention=self._attention(num_frames, noisy.device),
        )
        return flow[:, num_frames:]

    def _attention(self, num_frames: int, device: torch.device) -> AttentionFn:
        """Attention over clean and noisy frames: both are clips from the first frame on, with the clean one as past."""
        block, head_dim = self.frames_per_block, self.model.config.head_dim
        attend_clip = clip_attention(0, num_frames, block, self.cache, self.attention, head_dim, device, sink_shift=0)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            """q, k, v [B, H, T, D] -> [B, H, T, D]."""
            halves = [x.chunk(2, dim=2) for x in (q, k, v)]
            num_past = q.shape[2] // 2 // num_frames * (num_frames - block)
            past_k, past_v = (clean[:, :, :num_past] for clean, _ in halves[1:])
            outs = [
                attend_clip(own_q, torch.cat([past_k, own_k], dim=2), torch.cat([past_v, own_v], dim=2))
                for own_q, own_k, own_v in zip(*halves, strict=True)
            ]
            return torch.cat(outs, dim=2)

        return attend
