"""One bidirectional pass of a frozen transformer, its latent frames shared out over the ranks of a group.

The activations of the 14B teacher shrink by the size of the group. Under data parallelism each rank has samples of its
own, so the group computes those of its first rank, then those of its second, and so on, each rank its slice of the
frames. Only self-attention mixes frames: there every rank gathers the keys and values of all and attends with its own
queries, which is exact for any number of heads.

Shapes as in `models.dit`, with F_r the latent frames of rank r: sum F_r = F.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from longlive.errors import InputError
from longlive.models.attention import AttentionFn, sdpa
from longlive.models.dit import WanDiT


def share_frames(num_frames: int, num_ranks: int) -> list[int]:
    """Frames of each rank, as even as can be: 21 over 4 are 6, 5, 5, 5. Raises InputError where one would get none."""
    if num_ranks > num_frames:
        raise InputError(f"sequence parallelism over {num_ranks} ranks: the clip has only {num_frames} latent frames")
    base, extra = divmod(num_frames, num_ranks)
    return [base + (rank < extra) for rank in range(num_ranks)]


def gather(x: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    """The tensors of all ranks of the group, in order; they have one shape and type."""
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return parts


def gather_slices(x: Tensor, dim: int, lengths: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Put together what the ranks of the group hold as slices, of these lengths, along one dimension."""
    missing = max(lengths) - x.shape[dim]
    padded = F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing))  # collectives want equal sizes
    parts = zip(gather(padded, group), lengths, strict=True)
    return torch.cat([part.narrow(dim, 0, length) for part, length in parts], dim)


class SequenceParallel(nn.Module):
    """A score model that gives each rank the flow of its own samples, computed together by all ranks of a group."""

    def __init__(self, model: WanDiT, group: dist.ProcessGroup | None = None, attention: AttentionFn = sdpa) -> None:
        """group: by default all ranks; attention: the kernel that gets a rank's own queries and the keys of all."""
        super().__init__()
        self.model = model
        self.group = group
        self.attention = attention

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """The model's flow [B, F, C, height, width], without gradient.

        latents [B, F, C, height, width], timesteps [B] or [B, F] and text [B, L, text_dim] are each rank's own, of the
        same shapes and types everywhere; all ranks of the group call this together. Raises InputError with more ranks
        than frames.
        """
        assert not torch.is_grad_enabled(), "sequence parallelism passes no gradient"
        num_frames, rank = latents.shape[1], dist.get_rank(self.group)
        shares = share_frames(num_frames, dist.get_world_size(self.group))
        frames = torch.arange(num_frames, device=latents.device).split(shares)[rank]
        timesteps = (timesteps[:, None] if timesteps.ndim == 1 else timesteps).expand(-1, num_frames)

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            frame_tokens = q.shape[2] // shares[rank]
            lengths = [frame_tokens * share for share in shares]
            k, v = (gather_slices(x, 2, lengths, self.group) for x in (k, v))
            return self.attention(q, k, v)

        samples = zip(*(gather(x, self.group) for x in (latents, timesteps, text)), strict=True)
        flows = [self.model(x[:, frames], t[:, frames], c, frames=frames, attention=attention) for x, t, c in samples]
        # [ranks, B, F_r, C, height, width] -> [ranks, B, F, C, height, width], of which one's own samples are wanted.
        return gather_slices(torch.stack(flows), 2, shares, self.group)[rank]
