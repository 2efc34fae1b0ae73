"""Training by flow matching on clips: of a bidirectional model from nothing, and of a causal one to begin with.

`Pretrain` is the plain objective of Wan (arXiv 2503.20314): predict v = noise - x0 at a random noise level; in a share
of the clips one frame has less noise than the others (in Diffusion Forcing, arXiv 2407.01392, each has a level of its
own).
`CausalInit` makes a causal model of a bidirectional one: the same by teacher forcing, every block at its own noise
level given the clean frames before it; or, with clips that hold a teacher's ODE trajectories, by regression of their
end from the states at the few denoising steps (CausVid, arXiv 2412.07772). B: samples of this process.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longlive.data.clips import ClipBatch, LatentSource
from longlive.data.order import Order
from longlive.flow import NUM_TRAIN_TIMESTEPS, FlowSchedule, add_noise, flow_to_x0
from longlive.rollout import Sampler
from longlive.training.clock import Clock
from longlive.training.draw import Draw, Pictures
from longlive.training.stage import Loss, Stage


@dataclass(frozen=True)
class FlowMatchingConfig:
    """shift: warp of the random timesteps; prompt_dropout: how often a clip is seen without its prompt, which guidance
    needs; hint_share: of the clips, see `Pretrain`; pictures: more prompts are seen in a step on them, which is what
    following prompts is learnt from."""

    shift: float = 5.0
    prompt_dropout: float = 0.1
    hint_share: float = 0.0
    pictures: Pictures = field(default_factory=Pictures)


class FlowMatching(Stage):
    """The loss of one network, "generator", on clips from the data. is_causal: and on their trajectories and pasts."""

    is_causal = False

    def __init__(
        self,
        generator: Callable[..., Tensor],
        clips: LatentSource,
        order: Order,
        encode_prompts: Callable[[Sequence[str]], Tensor],
        negative_prompt: str,
        config: FlowMatchingConfig,
        clock: Clock,
    ) -> None:
        self.generator = generator
        self.clips = clips
        self.order = order
        self.encode_prompts = encode_prompts
        self.negative = encode_prompts([negative_prompt])
        self.config = config
        self.clock = clock
        self.schedule = FlowSchedule(config.shift, clock.device)

    @abstractmethod
    def _loss(self, clips: ClipBatch, text: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """The loss of clips, which lie where the random numbers do, and the timesteps it was taken at."""

    def due(self, step: int) -> tuple[str, ...]:
        return ("generator",)

    def loss(self, network: str, draw: Draw) -> Loss:
        with self.clock.part("data"):
            draw, is_pictures = self.config.pictures.choose(draw)
            batch = self.clips.batch([self.order[sample] for sample in draw.samples])
            more = (batch.trajectory, batch.past, batch.learnt_from) if self.is_causal else ()
            clips = ClipBatch(
                batch.prompts,
                (batch.latents[:, :1] if is_pictures else batch.latents).to(draw.device),
                *(None if values is None else values.to(draw.device) for values in more),
            )
            text = self.encode_prompts(batch.prompts)
            if clips.trajectory is None:  # where a guided one ends depends on its prompt: it cannot do without it
                is_dropped = draw.of("dropout").uniform(1, 1) < self.config.prompt_dropout
                text = torch.where(is_dropped, self.negative, text)
        with self.clock.part("forward"):
            loss, timesteps = self._loss(clips, text, draw)
        return Loss(loss, {"timestep": timesteps.mean()}, clips.latents.shape[0] * clips.latents.shape[1])

    def _noise_levels(self, draw: Draw, num: int) -> Tensor:
        """Random noise levels [B, num], uniform before the warp."""
        return self.schedule.sigmas[draw.integers(len(self.schedule.sigmas), num)]


class Pretrain(FlowMatching):
    """A bidirectional model: one noise level for all frames of a clip, but for a frame that is a hint.

    Under much noise, a prompt that says how things move helps little as long as nobody can tell where they are. So in
    a share of the clips one frame lies at a noise level from 0 to 0.5: from there the prompt tells where to look in
    the others.
    """

    def _loss(self, clips: ClipBatch, text: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        x0 = clips.latents
        sigma = self._noise_levels(draw.of("timestep"), 1)
        if self.config.hint_share and x0.shape[1] > 1:
            sigma = self._with_hints(sigma, x0.shape[1], draw.of("hint"))
        timesteps = NUM_TRAIN_TIMESTEPS * sigma
        noise = draw.of("noise").normal(*x0.shape[1:])
        flow = self.generator(add_noise(x0, noise, sigma[..., None, None, None]), timesteps, text)
        return (flow.float() - (noise - x0)).square().mean(), timesteps

    def _with_hints(self, sigma: Tensor, num_frames: int, draw: Draw) -> Tensor:
        """Noise levels of every frame [B, F] from those of clips [B, 1]."""
        is_frame = draw.of("frame").integers(num_frames, 1) == torch.arange(num_frames, device=draw.device)
        is_there = draw.of("is there").uniform(1) < self.config.hint_share
        level = 0.5 * draw.of("level").uniform(1)
        return torch.where(is_frame & is_there, level.minimum(sigma), sigma)


class CausalInit(FlowMatching):
    """A causal model: teacher forcing with the window, sink and blocks of the rollout."""

    is_causal = True

    def __init__(
        self,
        generator: Callable[..., Tensor],
        clips: LatentSource,
        order: Order,
        encode_prompts: Callable[[Sequence[str]], Tensor],
        negative_prompt: str,
        config: FlowMatchingConfig,
        clock: Clock,
        sampler: Sampler,
    ) -> None:
        """generator: `TeacherForced`, or what stands for one."""
        super().__init__(generator, clips, order, encode_prompts, negative_prompt, config, clock)
        self.sampler = sampler

    def _loss(self, clips: ClipBatch, text: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        x0, trajectory, block = clips.latents, clips.trajectory, self.sampler.config.frames_per_block
        past = x0 if clips.past is None else clips.past
        if trajectory is None:
            levels = self._noise_levels(draw.of("timestep"), x0.shape[1] // block)
            timesteps = NUM_TRAIN_TIMESTEPS * levels
            sigma = levels.repeat_interleave(block, dim=1)[..., None, None, None]
            noise = draw.of("noise").normal(*x0.shape[1:])
            flow = self._flow(add_noise(x0, noise, sigma), past, timesteps, text)
            return mean_square(flow.float() - (noise - x0), clips.learnt_from), timesteps
        steps = draw.of("timestep").integers(len(self.sampler.timesteps), x0.shape[1] // block)
        timesteps, sigma = (
            torch.tensor(values, device=draw.device)[steps] for values in (self.sampler.timesteps, self.sampler.sigmas)
        )
        frames = steps.repeat_interleave(block, dim=1)[:, None, :, None, None, None]
        states = trajectory.gather(1, frames.expand(-1, 1, *x0.shape[1:])).squeeze(1)
        flow = self._flow(states, past, timesteps, text)
        predicted = flow_to_x0(flow, states, sigma.repeat_interleave(block, dim=1)[..., None, None, None])
        return mean_square(predicted - x0, clips.learnt_from), timesteps

    def _flow(self, noisy: Tensor, clean: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """Teacher forcing; timesteps [B, blocks]."""
        frames = timesteps.repeat_interleave(self.sampler.config.frames_per_block, dim=1)
        return self.generator(noisy, clean, frames, text)


def mean_square(errors: Tensor, learnt_from: Tensor | None) -> Tensor:
    """Of errors [B, F, ...], those of frames before `learnt_from` [B] taken as zero."""
    squares = errors.square()
    if learnt_from is not None:
        is_learnt = torch.arange(errors.shape[1], device=errors.device) >= learnt_from[:, None]
        squares = squares * is_learnt[..., None, None, None]
    return squares.mean()
