"""Training by distribution matching: Self-Forcing initialisation, and streaming long tuning.

No data, only prompts: the generator rolls out as at inference, the teacher says which way its samples should move, the
critic learns what they look like (Self-Forcing, arXiv 2506.08009; DMD2, arXiv 2405.14867). Both stages differ only in
the clip they look at: `SelfForcing` begins a new video every time, `Streaming` goes on with a long one (LongLive,
arXiv 2509.22622). Critic and generator each take a clip of their own.

Rollouts run on a plain copy of the generator with its LoRA merged in, in the compute type, the same on every process:
of all passes only those with gradient need the sharded, trained one. B: samples of this process.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longlive.data.order import Order
from longlive.models.dit import WanDiT
from longlive.models.kv_cache import CacheConfig, KVCache
from longlive.models.vae import WanVAE
from longlive.rollout import PUBLISHED_TRAINING_RECACHE_FRAMES, Passes, Rollout, Sampler, SwitchPolicy
from longlive.training.clip_pass import ClipPass
from longlive.training.clock import Clock
from longlive.training.dmd import DMD, Score
from longlive.training.draw import Draw
from longlive.training.parallel import copy_weights
from longlive.training.stage import FillSamples, Loss, Stage
from longlive.training.streaming import ChunkNoise, Clip, StreamingSequence, make_clip

EncodePrompts = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class Players:
    """The networks of distribution matching. rollout: the generator's plain copy; passes: its passes, or what stands
    for them; trained: what makes the generator's passes with gradient; lora_scale: alpha / rank of its LoRA; vae: only
    streaming needs one; encode_prompts: texts to embeddings [B, L, text_dim]."""

    generator: WanDiT
    rollout: WanDiT
    passes: Passes
    trained: WanDiT | ClipPass
    critic: Score
    teacher: Score
    vae: WanVAE
    encode_prompts: EncodePrompts
    lora_scale: float = 1.0


@dataclass(frozen=True)
class SamplingConfig:
    """How samples are made. num_frames, latent_shape (C, height, width): of a clip; policy: of a prompt switch, where
    "published_training" also adds the published noise to what enters the cache; critic_steps_per_generator_step: 5 in
    the paper; last_step_only: always exit at the last step; same_step_across_blocks: one exit step for all blocks."""

    latent_shape: tuple[int, int, int]
    num_frames: int = 21
    cache: CacheConfig = field(default_factory=CacheConfig)
    policy: SwitchPolicy = "keep"
    critic_steps_per_generator_step: int = 5
    last_step_only: bool = False
    same_step_across_blocks: bool = True


class DistributionMatching(Stage):
    """The losses of generator and critic on clips that the generator makes."""

    def __init__(
        self,
        players: Players,
        dmd: DMD,
        sampler: Sampler,
        config: SamplingConfig,
        prompts: Sequence[Sequence[str]],
        order: Order,
        negative_prompt: str,
        clock: Clock,
    ) -> None:
        """prompts: for every item of the data its prompt, or its prompts before and after a switch."""
        self.players = players
        self.dmd = dmd
        self.sampler = sampler
        self.config = config
        self.prompts = prompts
        self.order = order
        self.clock = clock
        self.negative = players.encode_prompts([negative_prompt])
        self._cache: KVCache | None = None
        self.updated("generator")

    @abstractmethod
    def next_clip(self, draw: Draw, has_gradient: bool) -> tuple[Clip, Tensor]:
        """A clip of the generator's and the embeddings [B, L, text_dim] of its prompt."""

    @abstractmethod
    def _longest(self) -> int:
        """Frames of the longest video."""

    def due(self, step: int) -> tuple[str, ...]:
        is_generator_due = step % self.config.critic_steps_per_generator_step == 0
        return ("generator", "critic") if is_generator_due else ("critic",)

    def loss(self, network: str, draw: Draw) -> Loss:
        draw, players, dmd = draw.of(network), self.players, self.dmd
        clip, text = self.next_clip(draw, has_gradient=network == "generator")
        samples = clip.latents.detach()
        raw_timesteps = draw.of("timestep").integers(1000, 1)
        noised = dmd.noised(samples, raw_timesteps, draw.of("score noise").normal(*samples.shape[1:]))
        metrics = {"timestep": noised.timesteps[:, 0].mean()}
        num_frames = clip.num_new * len(samples)
        if network == "critic":
            with self.clock.part("critic"):
                loss = dmd.critic_loss(samples, noised, players.critic, text, clip.num_new)
            return Loss(loss, metrics, num_frames)
        negative = self.negative.expand(len(text), -1, -1)
        with torch.no_grad():
            with self.clock.part("critic_score"):
                fake = dmd.guided_x0(players.critic, noised, text, negative, dmd.config.fake_guidance)
            with self.clock.part("teacher"):
                real = dmd.guided_x0(players.teacher, noised, text, negative, dmd.config.guidance)
        loss, gradient = dmd.generator_loss(clip.latents, fake, real, clip.num_new)
        return Loss(loss, metrics | {"gradient": gradient}, num_frames)

    def updated(self, network: str) -> None:
        if network == "generator":
            players = self.players
            with self.clock.part("copy"):
                copy_weights(players.rollout, dict(players.generator.named_parameters()), players.lora_scale)

    def _chunk_noise(self, draw: Draw, num_frames: int) -> ChunkNoise:
        """The random numbers of the next frames, the exit steps among them."""
        shape = (num_frames, *self.config.latent_shape)
        num_steps, num_blocks = len(self.sampler.timesteps), num_frames // self.sampler.config.frames_per_block
        shared = draw.of("exit step").shared
        exits = [
            num_steps - 1 if self.config.last_step_only else shared.randrange(num_steps) for _ in range(num_blocks)
        ]
        if self.config.same_step_across_blocks:
            exits = exits[:1] * num_blocks
        return ChunkNoise(
            noise=draw.of("noise").normal(*shape),
            renoise=[draw.of(f"renoise {step}").normal(*shape) for step in range(max(exits))],
            context=draw.of("context").normal(*shape) if self.config.policy == "published_training" else None,
            exit_steps=exits,
        )

    def _new_rollout(self, batch_size: int) -> Rollout:
        """A new video, in the memory of the last one.

        The past of a pass with gradient is read again in the backward pass, when all frames of the clip have been made:
        the cache must hold them besides what the clip's first block sees of the past.
        """
        if self._cache is None:
            window, (_, height, width) = self.config.cache.window_frames, self.config.latent_shape
            past, sink = window - self.sampler.config.frames_per_block, self.config.cache.sink_frames
            frames = max(self._longest() if window == -1 else past + self.config.num_frames, sink + 1)
            if self.config.policy == "published_training":
                frames = max(frames, sink + PUBLISHED_TRAINING_RECACHE_FRAMES)
            self._cache = self.players.rollout.new_cache(self.config.cache, batch_size, height, width, frames)
        self._cache.zero_()
        return Rollout(self.players.passes, self.sampler, self._cache, self.config.policy)


class SelfForcing(DistributionMatching):
    """Self-Forcing initialisation: every clip is the beginning of a new video."""

    def next_clip(self, draw: Draw, has_gradient: bool) -> tuple[Clip, Tensor]:
        items = [self.order[sample] for sample in draw.samples]
        text = self.players.encode_prompts([self.prompts[item][0] for item in items])
        with self.clock.part("rollout"):
            sequence = StreamingSequence(self._new_rollout(draw.batch_size), [text], trained=self.players.trained)
            noise = self._chunk_noise(draw, self.config.num_frames)
            new = sequence.generate(noise, 0 if has_gradient else None, is_last=True)
        return make_clip(self.players.vae, None, new, self.config.num_frames), text

    def _longest(self) -> int:
        return self.config.num_frames


@dataclass(frozen=True)
class StreamingConfig:
    """max_frames: where a sequence ends at the latest; min_new_frames: of every chunk but the first; train_first_chunk:
    the first chunk is trained on too; switch_frames: one is drawn for each sequence, or none where it is empty."""

    max_frames: int = 240
    min_new_frames: int = 18
    train_first_chunk: bool = True
    switch_frames: tuple[int, ...] = ()


class Streaming(DistributionMatching):
    """Streaming long tuning: chunk after chunk of one long video, through a prompt switch, until it is long enough."""

    def __init__(
        self,
        players: Players,
        dmd: DMD,
        sampler: Sampler,
        config: SamplingConfig,
        prompts: Sequence[Sequence[str]],
        order: Order,
        negative_prompt: str,
        clock: Clock,
        streaming: StreamingConfig,
    ) -> None:
        self.streaming = streaming
        self.sequence: StreamingSequence | None = None
        self.previous: Tensor | None = None
        self.num_items_used = 0
        super().__init__(players, dmd, sampler, config, prompts, order, negative_prompt, clock)

    def next_clip(self, draw: Draw, has_gradient: bool) -> tuple[Clip, Tensor]:
        limit = self.streaming.max_frames - self.streaming.min_new_frames
        if self.sequence is None or self.sequence.num_frames > limit:
            self.sequence, self.previous = self._begin(draw), None
            if not self.streaming.train_first_chunk:
                self._next_clip(self.sequence, draw.of("first chunk"), has_gradient=False)
        return self._next_clip(self.sequence, draw, has_gradient)

    def _begin(self, draw: Draw) -> StreamingSequence:
        """A new sequence, with the next prompts."""
        first = self.num_items_used + draw.offset
        self.num_items_used += draw.num_samples
        texts = [self.prompts[self.order[item]] for item in range(first, first + draw.batch_size)]
        switches = self.streaming.switch_frames
        switch = draw.of("switch").shared.choice(switches) if switches else None
        columns = list(zip(*texts, strict=True))[: 1 if switch is None else 2]
        prompts = [self.players.encode_prompts(column) for column in columns]
        return StreamingSequence(self._new_rollout(draw.batch_size), prompts, switch, self.players.trained)

    def _next_clip(self, sequence: StreamingSequence, draw: Draw, has_gradient: bool) -> tuple[Clip, Tensor]:
        length = self.config.num_frames
        num_new = length if self.previous is None else self._num_new_frames(sequence.num_frames, draw)
        with self.clock.part("rollout"):
            new = sequence.generate(self._chunk_noise(draw, num_new), 0 if has_gradient else None)
        with self.clock.part("clip"):
            clip = make_clip(self.players.vae, self.previous, new, length)
        frames = new if self.previous is None else torch.cat([self.previous, new], dim=1)
        self.previous = frames[:, -length:].detach()
        return clip, sequence.prompt

    def _num_new_frames(self, num_frames: int, draw: Draw) -> int:
        """Drawn from whole blocks that leave an overlap, and room in the sequence."""
        block = self.sampler.config.frames_per_block
        most = min(self.config.num_frames - block, self.streaming.max_frames - num_frames)
        return draw.of("new frames").shared.choice(range(self.streaming.min_new_frames, most + 1, block))

    def state(self) -> dict[str, Any]:
        """The sequence in the making: where it is, its newest frames, its prompts, and the cache with keys and values
        that older weights have made."""
        if self.sequence is None or self.previous is None:
            return {"samples": {}, "values": {"num_items_used": self.num_items_used, "num_frames": 0}}
        values = {
            "num_items_used": self.num_items_used,
            "num_frames": self.sequence.num_frames,
            "num_recent": 0 if self.sequence.rollout.recent is None else self.sequence.rollout.recent.shape[1],
            "switch_frame": self.sequence.switch_frame,
        }
        return {"samples": self._samples(self.sequence, self.previous), "values": values}

    def restore(self, values: Mapping[str, Any], batch_size: int, fill: FillSamples | None) -> None:
        self.num_items_used = values["num_items_used"]
        if values["num_frames"] == 0 or fill is None:
            return
        rollout, switch = self._new_rollout(batch_size), values["switch_frame"]
        latents = torch.zeros(batch_size, values["num_recent"], *self.config.latent_shape, device=self.negative.device)
        rollout.recent, rollout.num_frames = latents, values["num_frames"]
        text = self.negative.expand(batch_size, -1, -1)
        prompts = [text.clone() for _ in range(1 if switch is None else 2)]
        self.sequence = StreamingSequence(rollout, prompts, switch, self.players.trained)
        self.previous = latents.new_zeros(batch_size, self.config.num_frames, *self.config.latent_shape)
        fill(self._samples(self.sequence, self.previous))

    def _samples(self, sequence: StreamingSequence, previous: Tensor) -> dict[str, Tensor]:
        """The tensors of a sequence, by name, as they are in use."""
        assert sequence.rollout.recent is not None
        samples = {"previous": previous, "recent": sequence.rollout.recent}
        samples |= {f"prompt {i}": prompt for i, prompt in enumerate(sequence.prompts)}
        for index, layer in enumerate(sequence.rollout.cache.layers):
            samples |= {f"cache {index} k": layer.k, f"cache {index} v": layer.v}
            if sequence.rollout.cache.config.relative:
                samples |= {f"cache {index} sink k": layer.sink_k}
        return samples

    def _longest(self) -> int:
        return self.streaming.max_frames
