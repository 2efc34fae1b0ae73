"""The Wan2.1 video transformer: teacher, critic and causal generator in one module.

One `WanDiT` maps noisy latents, timesteps and a prompt to the flow. Without a cache attention is bidirectional over all
given frames (Wan, arXiv 2503.20314); with a `KVCache` and a plan the frames also see the past kept there, and leave
their own keys and values behind (LongLive, arXiv 2509.22622). Parameter names are the original Wan names.

Shapes: B batch, F latent frames, C channels, h x w tokens of a frame, S = h w, T = F S tokens, d = dim,
H heads, D = d / H, L = text_len.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from longlive.models.attention import AttentionFn, sdpa
from longlive.models.kv_cache import CacheConfig, CachePlan, KVCache, LayerCache
from longlive.models.rope import apply_rope, rope_table

TextKV = list[tuple[Tensor, Tensor]]
"""Cross-attention keys and values of a prompt, per layer: [B, H, L, D] each."""

LayerText = Tensor | tuple[Tensor, Tensor]
"""The prompt as one layer takes it: embedded [B, L, d], or its keys and values [B, H, L, D] each."""


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of a Wan transformer; the defaults are Wan2.1-T2V-1.3B's.

    sees_place: every patch is told where in the picture it lies, see `place_channels`. Wan's are not: RoPE tells them
    how far they are from each other, and the borders of a picture are seen only once there is little noise.
    """

    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    in_channels: int = 16
    out_channels: int = 16
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    sees_place: bool = False

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(f"dim={self.dim}: must be an even multiple of num_heads={self.num_heads}")
        if self.patch_size[0] != 1:
            raise ValueError(f"patch_size={self.patch_size}: patches of several frames are not supported")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def told(self) -> dict[str, Any]:
        """What files say of a model: all sizes, and whether it sees places where it does."""
        values = asdict(self)
        if not self.sees_place:
            del values["sees_place"]
        return values


PRESETS = {
    "1.3B": DiTConfig(),
    "14B": DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
    "tiny": DiTConfig(dim=256, ffn_dim=1024, num_heads=4, num_layers=8, freq_dim=64, text_dim=192, sees_place=True),
}

NUM_PLACE_CHANNELS = 8


def place_channels(height: int, width: int, device: torch.device) -> Tensor:
    """Where the values of a latent frame lie: [8, height, width] float32.

    Sine and cosine of pi/2 u and pi u, for u from -1 to 1 from the top to the bottom and from the left to the right.
    """
    rows, columns = ((torch.arange(size, device=device) + 0.5) * (2 / size) - 1 for size in (height, width))
    angles = torch.stack([rows[:, None].expand(height, width), columns.expand(height, width)]) * (math.pi / 2)
    return torch.cat([angles.sin(), angles.cos(), (2 * angles).sin(), (2 * angles).cos()])


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """[cos, sin] of t * 10000^(-i / half), i < half = dim / 2: [..., dim] float32, evaluated in float64."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=timesteps.device) / half
    angles = timesteps.double().unsqueeze(-1) * 10_000.0**-exponents
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, then times `weight`; over the whole width, all heads together."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Adaptive layer norm without parameters: LN(x) (1 + scale) + shift."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


Remat = Literal["none", "selective", "full"]
"""What the backward pass computes again instead of keeping: nothing; all of a block but its attention, which is a
large part of the arithmetic and a small one of the memory; or all of a block."""

_ATTENTION_OPS = {
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def _keep_attention(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep self-attention: with no fewer keys than queries it is worth it, which a short prompt's is not."""
    is_kept = op in _ATTENTION_OPS and args[1].shape[2] >= args[0].shape[2]
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


@dataclass(frozen=True)
class Context:
    """What every layer needs to know of a pass: positions, what to cache, another kernel, what to compute again."""

    rope: Tensor
    plan: CachePlan | None
    attention: AttentionFn | None
    remat: Remat


class Attention(nn.Module):
    """The projections that self- and cross-attention share."""

    def __init__(self, config: DiTConfig, attention: AttentionFn) -> None:
        super().__init__()
        d = config.dim
        self.num_heads = config.num_heads
        self.attention = attention
        self.q = nn.Linear(d, d)
        self.k = nn.Linear(d, d)
        self.v = nn.Linear(d, d)
        self.o = nn.Linear(d, d)
        self.norm_q = RMSNorm(d, config.eps)
        self.norm_k = RMSNorm(d, config.eps)

    def project_q(self, x: Tensor) -> Tensor:
        """Normalised queries [B, H, T, D] of x [B, T, d]."""
        return rearrange(self.norm_q(self.q(x)), "b t (h d) -> b h t d", h=self.num_heads)

    def project_kv(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised keys and plain values [B, H, T, D] of x [B, T, d]."""
        k = rearrange(self.norm_k(self.k(x)), "b t (h d) -> b h t d", h=self.num_heads)
        return k, rearrange(self.v(x), "b t (h d) -> b h t d", h=self.num_heads)

    def project_out(self, x: Tensor) -> Tensor:
        """x [B, H, T, D] -> [B, T, d]."""
        return self.o(rearrange(x, "b h t d -> b t (h d)"))


class SelfAttention(Attention):
    """Attention among the frames of a pass and, with a cache, to the past."""

    def forward(self, x: Tensor, past: LayerCache | None, context: Context) -> Tensor:
        """x [B, T, d] -> [B, T, d]."""
        q = apply_rope(self.project_q(x), context.rope)
        k, v = self.remember(x, past, context)
        attention = context.attention or self.attention
        return self.project_out(attention(q, k, v))

    def remember(self, x: Tensor, past: LayerCache | None, context: Context) -> tuple[Tensor, Tensor]:
        """All keys and values that x [B, T, d] sees; with a cache, its own are stored there on the way."""
        raw_k, v = self.project_kv(x)
        k = apply_rope(raw_k, context.rope)
        if past is None or context.plan is None:
            return k, v
        return past.update(raw_k, k, v, context.plan)


class CrossAttention(Attention):
    """Attention to the prompt. Padded rows of the prompt are not masked, as in Wan."""

    def forward(self, x: Tensor, text: LayerText) -> Tensor:
        """x [B, T, d] -> [B, T, d]."""
        k, v = self.project_kv(text) if isinstance(text, Tensor) else text
        return self.project_out(self.attention(self.project_q(x), k, v))


class Block(nn.Module):
    def __init__(self, config: DiTConfig, attention: AttentionFn) -> None:
        super().__init__()
        d = config.dim
        self.eps = config.eps
        self.self_attn = SelfAttention(config, attention)
        self.norm3 = nn.LayerNorm(d, eps=config.eps)
        self.cross_attn = CrossAttention(config, attention)
        self.ffn = nn.Sequential(nn.Linear(d, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, d))
        self.modulation = nn.Parameter(torch.randn(1, 6, d) / d**0.5)

    def forward(self, x: Tensor, time: Tensor, text: LayerText, past: LayerCache | None, context: Context) -> Tensor:
        """x [B, F, S, d] -> the same; time [B, F or 1, 6, d]."""
        if context.remat == "none" or not torch.is_grad_enabled():
            return self._forward(x, time, text, past, context)
        selective = partial(create_selective_checkpoint_contexts, _keep_attention)
        options: dict[str, Any] = {"context_fn": selective} if context.remat == "selective" else {}
        return checkpoint(
            self._forward, x, time, text, past, context, use_reentrant=False, preserve_rng_state=False, **options
        )

    def _forward(self, x: Tensor, time: Tensor, text: LayerText, past: LayerCache | None, context: Context) -> Tensor:
        shape = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + time).unsqueeze(-2).unbind(2)
        y = self.self_attn(modulate(x, shift1, scale1, self.eps).flatten(1, 2), past, context)
        x = x + gate1 * y.view(shape)
        x = x + self.cross_attn(self.norm3(x).flatten(1, 2), text).view(shape)
        return x + gate2 * self.ffn(modulate(x, shift2, scale2, self.eps))

    def remember(self, x: Tensor, time: Tensor, past: LayerCache, context: Context) -> None:
        """Only store the keys and values of x [B, F, S, d]."""
        shift, scale = (self.modulation + time).unsqueeze(-2).unbind(2)[:2]
        self.self_attn.remember(modulate(x, shift, scale, self.eps).flatten(1, 2), past, context)


class Head(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        d, (_, p, q) = config.dim, config.patch_size
        self.eps = config.eps
        self.head = nn.Linear(d, p * q * config.out_channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, d) / d**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, F, S, d], time [B, F or 1, d] -> [B, F, S, patch * C]."""
        shift, scale = (self.modulation + time.unsqueeze(2)).unsqueeze(-2).unbind(2)
        return self.head(modulate(x, shift, scale, self.eps))


class WanDiT(nn.Module):
    """Wan2.1 text-to-video transformer; see the head of this file."""

    def __init__(self, config: DiTConfig, attention: AttentionFn = sdpa, remat: Remat = "none") -> None:
        super().__init__()
        self.config = config
        self.remat: Remat = remat
        d = config.dim
        in_channels = config.in_channels + NUM_PLACE_CHANNELS * config.sees_place
        self.patch_embedding = nn.Conv3d(in_channels, d, config.patch_size, stride=config.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, d), nn.GELU("tanh"), nn.Linear(d, d))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, d), nn.SiLU(), nn.Linear(d, d))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.num_layers))
        self.head = Head(config)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor | TextKV,
        *,
        cache: KVCache | None = None,
        plan: CachePlan | None = None,
        frames: Tensor | None = None,
        attention: AttentionFn | None = None,
    ) -> Tensor:
        """Predict the flow v = noise - x0.

        latents [B, F, C, height, width]: any size that patches divide; timesteps [B] or [B, F] in [0, 1000]; text:
        prompt embeddings [B, L, text_dim] (zero-padded, not masked) or what `project_text` made of them; cache and
        plan: the past and what to do with it; frames [F]: positions, by default the plan's, or 0..F-1; attention:
        another self-attention for this pass. Returns [B, F, C, height, width] in the model's type.
        """
        x, time, embedded, context = self._embed(latents, timesteps, cache, plan, frames, attention)
        past: Sequence[LayerCache | None] = [None] * len(self.blocks) if cache is None else cache.layers
        if cache is not None and plan is not None and plan.past is not None:
            past = [layer.for_gradient() for layer in cache.layers]
        for block, layer_text, layer_past in zip(self.blocks, self._text_layers(text), past, strict=True):
            x = block(x, time, layer_text, layer_past, context)
        return self._unpatchify(self.head(x, embedded), latents)

    def remember(
        self, latents: Tensor, timesteps: Tensor, text: Tensor | TextKV, *, cache: KVCache, plan: CachePlan
    ) -> None:
        """A pass that only leaves keys and values in the cache: the last layer stops there, the head is not needed."""
        x, time, _, context = self._embed(latents, timesteps, cache, plan, None, None)
        *layers, last = zip(self.blocks, self._text_layers(text), cache.layers, strict=True)
        for block, layer_text, past in layers:
            x = block(x, time, layer_text, past, context)
        block, _, past = last
        cast(Block, block).remember(x, time, past, context)

    def project_text(self, prompt_embeds: Tensor) -> TextKV:
        """Cross-attention keys and values of prompt embeddings [B, L, text_dim], once per prompt."""
        tokens = self.text_embedding(prompt_embeds.to(self.patch_embedding.weight.dtype))
        return [block.cross_attn.project_kv(tokens) for block in cast(Iterable[Block], self.blocks)]

    def new_cache(
        self,
        config: CacheConfig,
        batch_size: int,
        latent_height: int,
        latent_width: int,
        capacity_frames: int | None = None,
    ) -> KVCache:
        """An empty cache for videos of this latent size, on the model's device and in its type."""
        weight = self.patch_embedding.weight
        _, p, q = self.config.patch_size
        return KVCache(
            config,
            num_layers=self.config.num_layers,
            batch_size=batch_size,
            num_heads=self.config.num_heads,
            head_dim=self.config.head_dim,
            frame_tokens=(latent_height // p) * (latent_width // q),
            dtype=weight.dtype,
            device=weight.device,
            capacity_frames=capacity_frames,
        )

    def move_sink(self, cache: KVCache, plan: CachePlan, latent_height: int, latent_width: int) -> None:
        """Turn the cache's sink to where a pass sees it, unless it is there already. Every pass begins so."""
        if plan.sink_shift != cache.sink_shift:
            sink = torch.arange(cache.config.sink_frames, device=cache.device) + plan.sink_shift
            cache.move_sink(self._rope_table(sink, latent_height, latent_width), plan)

    def _embed(
        self,
        latents: Tensor,
        timesteps: Tensor,
        cache: KVCache | None,
        plan: CachePlan | None,
        frames: Tensor | None,
        attention: AttentionFn | None,
    ) -> tuple[Tensor, Tensor, Tensor, Context]:
        """Tokens [B, F, S, d], time modulation [B, F or 1, 6, d], time embedding [B, F or 1, d], attention context."""
        dtype = self.patch_embedding.weight.dtype
        num_frames, height, width = latents.shape[1], latents.shape[3], latents.shape[4]
        if self.config.sees_place:
            place = place_channels(height, width, latents.device).to(latents.dtype)
            latents = torch.cat([latents, place.expand(*latents.shape[:2], -1, -1, -1)], dim=2)
        x = self.patch_embedding(rearrange(latents.to(dtype), "b f c h w -> b c f h w"))
        x = rearrange(x, "b d f h w -> b f (h w) d")
        timesteps = timesteps[:, None] if timesteps.ndim == 1 else timesteps
        embedded = self.time_embedding(timestep_embedding(timesteps, self.config.freq_dim).to(dtype))
        time = self.time_projection(embedded).unflatten(-1, (6, -1))
        if frames is None:
            frames = torch.arange(num_frames, device=x.device) if plan is None else plan.frames
        if cache is not None and plan is not None:
            self.move_sink(cache, plan, height, width)
        return x, time, embedded, Context(self._rope_table(frames, height, width), plan, attention, self.remat)

    def _rope_table(self, frames: Tensor, latent_height: int, latent_width: int) -> Tensor:
        _, p, q = self.config.patch_size
        return rope_table(frames, latent_height // p, latent_width // q, self.config.head_dim)

    def _text_layers(self, text: Tensor | TextKV) -> Sequence[LayerText]:
        """The prompt as each layer takes it; embeddings are projected inside the blocks, with gradient."""
        if not isinstance(text, Tensor):
            return text
        tokens = self.text_embedding(text.to(self.patch_embedding.weight.dtype))
        return [tokens] * self.config.num_layers

    def _unpatchify(self, x: Tensor, latents: Tensor) -> Tensor:
        """[B, F, S, p q C] -> [B, F, C, height, width]; the channel is the fastest index of a token."""
        _, p, q = self.config.patch_size
        x = rearrange(x, "b f (h w) (p q c) -> b f c (h p) (w q)", h=latents.shape[3] // p, p=p, q=q)
        return x.contiguous()


def init_weights(model: WanDiT) -> None:
    """Fresh weights for training from nothing: Xavier projections, small embeddings, zero output (Wan's scheme)."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.patch_embedding.weight.flatten(1))
    for module in [*model.text_embedding, *model.time_embedding]:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
    nn.init.zeros_(model.head.head.weight)
