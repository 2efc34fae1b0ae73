"""One batch of videos being made, block by block, with prompts that may change at every block boundary.

`Session` is what the scripts and a server drive: no files, no threads, no clock. It joins the text encoder, the
rollout and the streaming decoder, and owns the noise. A chunk is what one block yields.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from longlive.errors import InputError
from longlive.models.dit import WanDiT
from longlive.models.kv_cache import CacheConfig
from longlive.models.vae import CausalConv3d, StreamCache, Upsample, WanVAE
from longlive.rollout import Rollout, Sampler, SamplerConfig, SwitchPolicy

EncodePrompts = Callable[[Sequence[str]], Tensor]
"""Prompt embeddings [B, L, text_dim] of B prompts."""


@dataclass(frozen=True)
class Models:
    """What a session needs; several sessions may share them."""

    generator: WanDiT
    vae: WanVAE
    encode_prompts: EncodePrompts

    @property
    def device(self) -> torch.device:
        return self.generator.patch_embedding.weight.device


@dataclass(frozen=True)
class SessionConfig:
    """height, width: pixels. switch_policy: what becomes of the sink at a prompt switch."""

    height: int
    width: int
    sampler: SamplerConfig
    cache: CacheConfig
    switch_policy: SwitchPolicy = "keep"


@dataclass(frozen=True)
class Chunk:
    """What one block yields, for B videos.

    start_frame: latent frame at which it starts; latents [B, F, C, h, w] float32; pixels [B, V, height, width, 3]
    uint8, V video frames (1 for the first latent of a video, 4 for every other). All on the models' device, where they
    may still be in the making.
    """

    start_frame: int
    latents: Tensor
    pixels: Tensor


@dataclass(frozen=True)
class Snapshot:
    """Everything that changes in a session. Opaque; made by `snapshot`, taken by `restore`."""

    prompts: tuple[str, ...] | None
    next_prompts: tuple[str, ...] | None
    rollout: dict[str, Any]
    stream: StreamCache


@dataclass(frozen=True)
class Past:
    """Latents [B, F, C, h, w] of one chunk, on any device, and the prompts under which it was made."""

    prompts: tuple[str, ...]
    latents: Tensor


def block_noise(seed: int, start_frame: int, step: int, shape: Sequence[int]) -> Tensor:
    """Gaussian noise that depends on seed, position and step alone, made on the CPU: the same on every device.

    With no stream of random numbers to advance, a video does not depend on its neighbours in a batch, and going back to
    an earlier frame needs no generator state.
    """
    digest = hashlib.blake2b(f"{seed}/{start_frame}/{step}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.randn(tuple(shape), generator=generator)


def decoder_memory_frames(vae: WanVAE) -> int:
    """How many latents before a latent its pixels depend on: a causal convolution sees two frames back at its level."""

    def causal(module: nn.Module) -> int:
        return sum(isinstance(part, CausalConv3d) for part in module.modules())

    decoder = vae.decoder
    memory, rate = Fraction(2 * (causal(decoder.conv1) + causal(decoder.middle))), 1
    for block in decoder.upsamples:
        memory += Fraction(2 * causal(block), rate)
        if isinstance(block, Upsample) and block.time_conv is not None:
            memory += Fraction(2, rate)
            rate *= 2
    return ceil(memory + Fraction(2 * causal(decoder.head), rate)) + 1  # and one that is decoded as a video's first


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels [B, V, 3, height, width] in [-1, 1] to [B, V, height, width, 3] uint8, clamped and rounded."""
    scaled = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round()
    return scaled.to(torch.uint8).permute(0, 1, 3, 4, 2)


class Session:
    """Generates len(seeds) videos side by side. Not safe for concurrent use."""

    def __init__(self, models: Models, config: SessionConfig, seeds: Sequence[int]) -> None:
        """Raises InputError for a size that the models cannot make."""
        factor = models.vae.config.spatial_factor
        step = factor * models.generator.config.patch_size[1]
        if config.height % step or config.width % step:
            raise InputError(f"resolution {config.height}x{config.width}: height and width must be multiples of {step}")
        window, needed = config.cache.window_frames, config.cache.sink_frames + config.sampler.frames_per_block
        if window != -1 and window < needed:
            raise InputError(f"window_frames={window}: must be -1 or hold the sink and a block, at least {needed}")
        self.models = models
        self.config = config
        self.seeds = tuple(seeds)
        self._latent_shape = (models.vae.config.z_dim, config.height // factor, config.width // factor)
        cache = models.generator.new_cache(config.cache, len(seeds), *self._latent_shape[1:])
        self._rollout = Rollout(models.generator, Sampler(config.sampler), cache, config.switch_policy)
        self._stream = models.vae.new_cache()
        self._prompts: tuple[str, ...] | None = None
        self._next_prompts: tuple[str, ...] | None = None

    @property
    def num_frames(self) -> int:
        """Latent frames made so far."""
        return self._rollout.num_frames

    def set_prompt(self, prompts: str | Sequence[str]) -> None:
        """The prompt (one for all videos, or one each) from the next block on. Cheap until that block is made.

        A new prompt for one video recaches all of the session; videos that switch at other times belong in sessions of
        their own.
        """
        each = (prompts,) * len(self.seeds) if isinstance(prompts, str) else tuple(prompts)
        if len(each) != len(self.seeds):
            raise InputError(f"{len(each)} prompts for {len(self.seeds)} videos")
        self._next_prompts = each

    @torch.no_grad()
    def next_chunk(self) -> Chunk:
        """Make the next block of every video."""
        self._switch()
        start, num = self.num_frames, self.config.sampler.frames_per_block
        noise = self._noise(start, num, 0)
        latents = self._rollout.next_block(noise, lambda step: self._noise(start, num, step + 1))
        return self._decode(start, latents)

    @torch.no_grad()
    def start_from(self, pixels: Tensor) -> Chunk:
        """Begin with a picture or clip: [B or 1, 1 + 4k, 3, height, width] in [-1, 1] goes through the cache as clean
        context, and the videos go on from there. Comes after the first `set_prompt`, before the first block.

        Returns the given frames as the models see them.
        """
        if self.num_frames:
            raise InputError(f"start_from after {self.num_frames} frames: a session can only begin with a clip")
        self._switch()
        batch = pixels.expand(len(self.seeds), -1, -1, -1, -1)
        latents = self.models.vae.encode(batch.to(self.models.device)).float()
        self._rollout.prefill(latents)
        return self._decode(0, latents)

    def resume(self, past: Sequence[Past]) -> Iterator[None]:
        """Take a new session to where one of the same seeds stood, from what that has made; run it to the end.

        It goes on with the same latents and pixels, bit for bit: the cache is filled by the passes that filled it at
        first, but for those that cannot matter any more, and the decoder reads what it remembers. A generator, so that
        others can have their turn between passes. Latents in the models' dtype are exact enough.
        """
        assert self.num_frames == 0, "resume comes first"
        starts = list(accumulate((chunk.latents.shape[1] for chunk in past), initial=0))
        latents = torch.cat([chunk.latents for chunk in past], dim=1)
        first, window = self._replay_from(past, starts), self.config.cache.window_frames
        for chunk, start in zip(past, starts, strict=False):
            if window < start < first:
                continue
            self.set_prompt(chunk.prompts)
            with torch.no_grad():
                if start > self.num_frames:
                    self._rollout.recent = self._on_device(latents[:, start - window : start])
                    self._rollout.num_frames, self._prompts = start, None  # so that this prompt recaches
                self._switch()
                self._rollout.prefill(self._on_device(chunk.latents))
            yield
        for latent in latents[:, -decoder_memory_frames(self.models.vae) :].split(1, dim=1):
            with torch.no_grad():
                self.models.vae.decode(self._on_device(latent), self._stream)
            yield

    def _replay_from(self, past: Sequence[Past], starts: Sequence[int]) -> int:
        """The first frame to replay, besides those of the first window, which fill the sink; 0 for all.

        A switch reads again all that is kept, the sink excepted: what came before it is forgotten. And what a pass
        leaves in layer l of the cache depends on no more than the l windows before it.
        """
        cache, policy = self.config.cache, self.config.switch_policy
        if cache.window_frames == -1 or policy not in ("keep", "rewrite"):
            return 0
        first = 0
        for before, after, start in zip(past, past[1:], starts[1:], strict=False):
            if before.prompts != after.prompts and start > cache.window_frames:
                first = start
        if policy == "keep":
            depth = len(self.models.generator.blocks) * (cache.window_frames - cache.sink_frames)
            reachable = [start for start in starts if start <= starts[-1] - depth]
            first = max([first, *reachable])
        return first if first > cache.window_frames else 0

    def _on_device(self, latents: Tensor) -> Tensor:
        return latents.to(self.models.device, torch.float32)

    def snapshot(self) -> Snapshot:
        """The present state, independent of what comes after."""
        return Snapshot(self._prompts, self._next_prompts, self._rollout.state(), self._stream.clone())

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this session; generation continues from there exactly as it did then."""
        self._prompts, self._next_prompts = snapshot.prompts, snapshot.next_prompts
        self._rollout.load_state(snapshot.rollout)
        self._stream = snapshot.stream.clone()

    def close(self) -> None:
        """Free the caches. The session cannot be used afterwards."""
        del self._rollout, self._stream

    def _switch(self) -> None:
        assert self._prompts is not None or self._next_prompts is not None, "set_prompt comes first"
        if self._next_prompts is not None and self._next_prompts != self._prompts:
            embeddings = self.models.encode_prompts(self._next_prompts)
            self._rollout.set_text(self.models.generator.project_text(embeddings))
            self._prompts = self._next_prompts

    def _noise(self, start_frame: int, num_frames: int, step: int) -> Tensor:
        shape = (num_frames, *self._latent_shape)
        noise = torch.stack([block_noise(seed, start_frame, step, shape) for seed in self.seeds])
        if self.models.device.type == "cuda":
            noise = noise.pin_memory()
        return noise.to(self.models.device, non_blocking=True)

    def _decode(self, start_frame: int, latents: Tensor) -> Chunk:
        pixels = self.models.vae.decode(latents, self._stream)
        return Chunk(start_frame, latents, to_uint8(pixels))
