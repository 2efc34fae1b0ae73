"""The few-step autoregressive rollout: denoise a block, clean its cache entries, move on; recache at a prompt switch.

Self-Forcing (arXiv 2506.08009) and LongLive (arXiv 2509.22622). This is the only few-step loop: inference drives it
block by block and training builds on the same functions. Latents are [B, F, C, height, width], float32.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from longlive.flow import FlowSchedule, add_noise, flow_to_x0
from longlive.models.dit import TextKV, WanDiT
from longlive.models.kv_cache import CacheConfig, CachePlan, KVCache, SinkWrite

RenoiseFn = Callable[[int], Tensor]
"""Fresh noise [B, F, C, height, width] for the renoising after denoising step i."""

SwitchPolicy = Literal["keep", "rewrite", "published_training", "none"]
"""What becomes of the cache at a prompt switch, once the video is longer than the window.

keep: the sink stays as it is, the rest of the window is recomputed under the new prompt (`global_sink: true`).
rewrite: the whole window is recomputed and its first frames become the new sink (`global_sink: false`).
published_training: everything is zeroed, the newest 21 frames are recomputed, the sink stays zero.
none: nothing is recomputed; the new prompt meets a cache made under the old one.
In a video no longer than the window all frames are recomputed, the sink among them, whatever the policy.
"""

PUBLISHED_TRAINING_RECACHE_FRAMES = 21


class Passes(Protocol):
    """What a rollout asks of a transformer: a `WanDiT`, or its passes replayed."""

    def __call__(
        self, latents: Tensor, timesteps: Tensor, text: TextKV, *, cache: KVCache, plan: CachePlan
    ) -> Tensor: ...

    def remember(
        self, latents: Tensor, timesteps: Tensor, text: TextKV, *, cache: KVCache, plan: CachePlan
    ) -> None: ...

    def project_text(self, prompt_embeds: Tensor) -> TextKV: ...


@dataclass(frozen=True)
class SamplerConfig:
    """The few denoising steps. steps: positions in 1..1000, descending; warp: map them through the shifted schedule;
    context_timestep: the noise level at which finished frames are read back into the cache."""

    steps: tuple[int, ...] = (1000, 750, 500, 250)
    warp: bool = True
    shift: float = 5.0
    context_timestep: float = 0.0
    frames_per_block: int = 3


class Sampler:
    """Timesteps and noise levels of the denoising steps, as Python floats: the block loop never asks the device."""

    def __init__(self, config: SamplerConfig) -> None:
        schedule = FlowSchedule(config.shift)
        steps = schedule.warp_steps(config.steps) if config.warp else torch.tensor(config.steps, dtype=torch.float32)
        self.config = config
        self.timesteps: list[float] = steps.tolist()
        self.sigmas: list[float] = schedule.sigma_at(steps).tolist()
        self.context_sigma: float = schedule.sigma_at(torch.tensor(config.context_timestep)).item()


def constant_timesteps(latents: Tensor, timestep: float) -> Tensor:
    """[B, 1]: the same timestep for every frame."""
    return torch.full((latents.shape[0], 1), timestep, device=latents.device)


@dataclass(frozen=True)
class ExitStep:
    """What the exit step of a block is given: xt [B, F, C, height, width] at a timestep and its noise level."""

    xt: Tensor
    timestep: float
    sigma: float


@dataclass(frozen=True)
class BlockTraining:
    """How a block is made in training (Self-Forcing).

    exit_step: the last step made, whose x0 is the result. trained: the network that makes this step with gradient, or
    None: all passes are the rollout's own, without; it may hold its weights elsewhere, shared out or in another type.
    prompt_embeds [B, L, text_dim]: what it is given as prompt, whose projections have a gradient too. context_noise:
    noise of the block's shape, added at the level of the context timestep to what enters the cache, or None.
    is_last: nothing will follow that could see the block, so it need not enter the cache. exits: takes note of what the
    exit step is given, for a pass with gradient after all blocks.
    """

    exit_step: int
    trained: WanDiT | None = None
    prompt_embeds: Tensor | None = None
    context_noise: Tensor | None = None
    is_last: bool = False
    exits: list[ExitStep] | None = None


def denoise_block(
    model: Passes,
    noise: Tensor,
    text: TextKV,
    cache: KVCache,
    start_frame: int,
    sampler: Sampler,
    renoise: RenoiseFn,
    training: BlockTraining | None = None,
) -> Tensor:
    """Turn noise [B, F, C, height, width] into the clean latents of frames start_frame.. and remember them.

    For every step predict x0, then renoise it to the next level; last, one clean pass whose only purpose is to leave
    clean keys and values in the cache. Only the exit step of training has a gradient, and none through the cache.
    """
    num_frames = noise.shape[1]
    num_steps = len(sampler.timesteps) if training is None else training.exit_step + 1
    first_plan, plan = cache.plan_block(start_frame, num_frames)
    xt, x0 = noise, noise
    for step in range(num_steps):
        timestep, sigma = sampler.timesteps[step], sampler.sigmas[step]
        if step > 0:
            xt = add_noise(x0, renoise(step - 1), sigma)
        timesteps = constant_timesteps(xt, timestep)
        is_exit = step == num_steps - 1
        if is_exit and training is not None and training.exits is not None:
            training.exits.append(ExitStep(xt, timestep, sigma))
        if is_exit and training is not None and training.trained is not None:
            gradient_plan = cache.plan_gradient(start_frame, num_frames, is_first=step == 0)
            flow = training.trained(xt, timesteps, training.prompt_embeds, cache=cache, plan=gradient_plan)
        else:
            with torch.no_grad():
                flow = model(xt, timesteps, text, cache=cache, plan=first_plan if step == 0 else plan)
        x0 = flow_to_x0(flow, xt, sigma)
    if training is not None and training.is_last:
        return x0
    with torch.no_grad():
        context = x0
        if training is not None and training.context_noise is not None:
            context = add_noise(x0, training.context_noise, sampler.context_sigma)
        timesteps = constant_timesteps(x0, sampler.config.context_timestep)
        model.remember(context, timesteps, text, cache=cache, plan=plan)
    return x0


@torch.no_grad()
def recache(
    model: Passes,
    recent: Tensor,
    num_frames: int,
    text: TextKV,
    cache: KVCache,
    policy: SwitchPolicy,
    context_timestep: float = 0.0,
) -> None:
    """Read the newest frames back into the cache under a new prompt, in one pass (KV-recache, arXiv 2509.22622).

    recent [B, R, C, height, width]: the newest clean latents of `num_frames` so far, at least `recache_frames` of them.
    """
    wanted = recache_frames(cache.config, policy)
    start = 0 if wanted == -1 else max(0, num_frames - wanted)
    sink: SinkWrite = "fill"
    if policy == "published_training":
        cache.zero_()
        sink = "fill" if start == 0 else "keep"
    elif start > 0 and policy == "rewrite":
        sink = "rewrite"
    elif start > 0:  # the oldest recached frames would only feed the sink, which stays
        sink, start = "keep", start + cache.config.sink_frames
    latents = recent[:, recent.shape[1] - (num_frames - start) :]
    plan = cache.plan(start, latents.shape[1], sink)
    model.remember(latents, constant_timesteps(latents, context_timestep), text, cache=cache, plan=plan)


def recache_frames(config: CacheConfig, policy: SwitchPolicy) -> int:
    """How many of the newest frames a switch may read back; -1 means all."""
    return PUBLISHED_TRAINING_RECACHE_FRAMES if policy == "published_training" else config.window_frames


class Rollout:
    """The state of one batch of videos being generated: cache, prompt, newest frames, position.

    Prompts may change before any block; `state` and `load_state` go back to an earlier moment.
    """

    def __init__(
        self,
        model: Passes,
        sampler: Sampler,
        cache: KVCache,
        policy: SwitchPolicy = "keep",
    ) -> None:
        self.model = model
        self.sampler = sampler
        self.policy: SwitchPolicy = policy
        self.cache = cache
        self.text: TextKV | None = None
        self.recent: Tensor | None = None
        self.num_frames = 0

    def set_text(self, text: TextKV) -> None:
        """Take a new prompt for all coming frames; frames made so far are recached under it."""
        self.text = text
        if self.recent is not None and self.policy != "none":
            timestep = self.sampler.config.context_timestep
            recache(self.model, self.recent, self.num_frames, text, self.cache, self.policy, timestep)

    def next_block(self, noise: Tensor, renoise: RenoiseFn, training: BlockTraining | None = None) -> Tensor:
        """Make the next frames from noise [B, F, C, height, width]; returns their clean latents."""
        assert self.text is not None, "set_text comes before next_block"
        x0 = denoise_block(self.model, noise, self.text, self.cache, self.num_frames, self.sampler, renoise, training)
        self._append(x0.detach())
        return x0

    @torch.no_grad()
    def prefill(self, latents: Tensor) -> None:
        """Continue from given clean latents [B, F, C, height, width]: they pass through the cache block by block."""
        assert self.text is not None, "set_text comes before prefill"
        for block in latents.split(self.sampler.config.frames_per_block, dim=1):
            plan = self.cache.plan(self.num_frames, block.shape[1])
            timesteps = constant_timesteps(block, self.sampler.config.context_timestep)
            self.model.remember(block, timesteps, self.text, cache=self.cache, plan=plan)
            self._append(block)

    def state(self) -> dict[str, Any]:
        """A copy of all that changes, for `load_state`."""
        return {
            "cache": copy.deepcopy(self.cache),
            "text": self.text,
            "recent": self.recent,
            "num_frames": self.num_frames,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go back to a copy made by `state`, which stays usable."""
        del self.cache  # before the copy: it may fill half of the GPU
        self.cache = copy.deepcopy(state["cache"])
        self.text, self.recent, self.num_frames = state["text"], state["recent"], state["num_frames"]

    def _append(self, latents: Tensor) -> None:
        self.num_frames += latents.shape[1]
        recent = latents if self.recent is None else torch.cat([self.recent, latents], dim=1)
        wanted = recache_frames(self.cache.config, self.policy)
        self.recent = recent if wanted == -1 else recent[:, -wanted:]
