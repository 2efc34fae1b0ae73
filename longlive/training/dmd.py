"""Distribution matching: what teacher and critic say about the generator's samples, as losses.

DMD2 (arXiv 2405.14867) on latents [B, F, C, height, width]. The teacher ("real score") and the critic ("fake score")
see the samples at one random noise level; the difference of their predictions is the gradient for the generator, while
the critic learns by flow matching what the generator makes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from longlive.flow import FlowSchedule, add_noise, flow_to_x0, x0_to_flow

Score = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A bidirectional WanDiT, or what stands for one: (latents, timesteps [B, F], prompt [B, L, text_dim]) -> flow."""


@dataclass(frozen=True)
class DMDConfig:
    """Guidance: x0 = cond + guidance (cond - uncond). shift warps the random timesteps, which are clamped to
    [min_timestep, max_timestep], and sets the noise level at a timestep; score_shift is that of the table with which
    the published wrappers turn a score model's flow into x0."""

    guidance: float = 3.0
    fake_guidance: float = 0.0
    shift: float = 5.0
    score_shift: float = 8.0
    min_timestep: float = 20.0
    max_timestep: float = 980.0


@dataclass(frozen=True)
class Noised:
    """Samples at a random noise level. xt and noise as the samples; timesteps, sigma [B, F] and [B, F, 1, 1, 1]."""

    xt: Tensor
    noise: Tensor
    timesteps: Tensor
    sigma: Tensor


class DMD:
    """The losses of one configuration; holds tables, no weights."""

    def __init__(self, config: DMDConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.schedule = FlowSchedule(config.shift, device)
        self.score_schedule = FlowSchedule(config.score_shift, device)

    def noised(self, samples: Tensor, raw_timesteps: Tensor, noise: Tensor) -> Noised:
        """Noise the samples. raw_timesteps [B, 1]: uniform in [0, 1000), one for all frames of a sample."""
        config = self.config
        timesteps = self.schedule.shift_timesteps(raw_timesteps, config.min_timestep, config.max_timestep)
        timesteps = timesteps.expand(-1, samples.shape[1])
        sigma = self.schedule.sigma_at(timesteps)[..., None, None, None]
        return Noised(add_noise(samples, noise, sigma), noise, timesteps, sigma)

    def predict_x0(self, score: Score, noised: Noised, text: Tensor) -> Tensor:
        """A score model's x0 for a prompt [B, L, text_dim]."""
        flow = score(noised.xt, noised.timesteps, text)
        sigma = self.score_schedule.sigma_at(noised.timesteps)[..., None, None, None]
        return flow_to_x0(flow, noised.xt, sigma)

    def guided_x0(self, score: Score, noised: Noised, text: Tensor, negative: Tensor, guidance: float) -> Tensor:
        """x0 with classifier-free guidance; negative: the negative prompt [B, L, text_dim]."""
        cond = self.predict_x0(score, noised, text)
        if guidance == 0.0:
            return cond
        return cond + guidance * (cond - self.predict_x0(score, noised, negative))

    def generator_loss(
        self, samples: Tensor, fake: Tensor, real: Tensor, num_new: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """½ mean (x - sg(x - g))², with g = (x0_fake - x0_real) / mean |x - x0_real|: its gradient is g up to a factor.

        samples: with gradient; fake, real: the guided x0 of critic and teacher for them, noised; num_new: how many
        frames at the end count, by default all (the normaliser takes all). Returns the loss (float64) and mean |g|.
        """
        with torch.no_grad():
            scale = (samples - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
            gradient = (fake - real) / scale
            target = (samples - gradient).double()
        return 0.5 * mean_of_new((samples.double() - target).square(), num_new), gradient.abs().mean()

    def critic_loss(
        self, samples: Tensor, noised: Noised, critic: Score, text: Tensor, num_new: int | None = None
    ) -> Tensor:
        """Flow matching on the generator's samples: mean (v - (noise - x))² of the newest `num_new` frames, or all."""
        flow = x0_to_flow(self.predict_x0(critic, noised, text), noised.xt, noised.sigma)
        return mean_of_new((flow - (noised.noise - samples)).square(), num_new)


def mean_of_new(values: Tensor, num_new: int | None) -> Tensor:
    """Mean over the last `num_new` frames of values [B, F, ...], over all where it is None; the device is not waited
    for, as it would be with a mask."""
    return (values if num_new is None else values[:, -num_new:]).mean()
