"""Flow matching: the noise schedule and the conversions between x_t, x0, noise and flow.

    x_t = (1 - sigma) x0 + sigma noise        flow v = noise - x0        x0 = x_t - sigma v

Wan (arXiv 2503.20314) trains with 1,000 uniform sigmas warped towards noise by `shift`:
sigma' = s sigma / (1 + (s - 1) sigma), and calls t = 1000 sigma' the timestep.
Layer 0: tensors in, tensors out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Warp uniform noise levels in [0, 1] towards 1: s sigma / (1 + (s - 1) sigma)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """x_t at noise level sigma, which broadcasts against `x0`."""
    return (1 - sigma) * x0 + sigma * noise


def flow_to_x0(flow: Tensor, xt: Tensor, sigma: Tensor | float) -> Tensor:
    """x0 = x_t - sigma v, evaluated in float64 and returned in the type of `xt`."""
    return (xt.double() - sigma * flow.double()).to(xt.dtype)


def x0_to_flow(x0: Tensor, xt: Tensor, sigma: Tensor | float) -> Tensor:
    """v = (x_t - x0) / sigma, evaluated in float64 and returned in the type of `xt`."""
    return ((xt.double() - x0.double()) / sigma).to(xt.dtype)


class FlowSchedule:
    """The table of the 1,000 training noise levels, descending from 1.

    sigmas: [1000] float32; timesteps: [1000] float32 = 1000 sigmas. Lookups take the nearest entry, so t = 0 finds the
    last one (sigma 0.00498 at shift 5), not zero.
    """

    def __init__(self, shift: float, device: torch.device | str = "cpu") -> None:
        uniform = torch.linspace(1, 0, NUM_TRAIN_TIMESTEPS + 1, device=device)[:-1]
        self.shift = shift
        self.sigmas = shift_sigma(uniform, shift)
        self.timesteps = self.sigmas * NUM_TRAIN_TIMESTEPS

    def nearest_index(self, timesteps: Tensor) -> Tensor:
        """Index of the table entry nearest to each timestep (the first of equals). Any shape, int64."""
        return (self.timesteps - timesteps.unsqueeze(-1)).abs().argmin(dim=-1)

    def sigma_at(self, timesteps: Tensor) -> Tensor:
        """Noise level of the table entry nearest to each timestep. Any shape, float32."""
        return self.sigmas[self.nearest_index(timesteps)]

    def warp_steps(self, steps: Sequence[int]) -> Tensor:
        """Timesteps at the given positions counted from the clean end: step 1000 is t = 1000, step 0 is t = 0."""
        table = torch.cat([self.timesteps, self.timesteps.new_zeros(1)])
        return table[NUM_TRAIN_TIMESTEPS - torch.tensor(steps, device=table.device)]

    def shift_timesteps(self, timesteps: Tensor, low: float, high: float) -> Tensor:
        """Warp uniform timesteps in [0, 1000) by the shift and clamp them to [low, high] (DMD, arXiv 2405.14867)."""
        warped = shift_sigma(timesteps / NUM_TRAIN_TIMESTEPS, self.shift) * NUM_TRAIN_TIMESTEPS
        return warped.clamp(low, high)

    def training_weights(self) -> Tensor:
        """Bell-shaped loss weight of each table entry, centred on t = 500, with mean 1. [1000] float32."""
        bell = torch.exp(-2 * ((self.timesteps - NUM_TRAIN_TIMESTEPS / 2) / NUM_TRAIN_TIMESTEPS) ** 2)
        bell = bell - bell.min()
        return bell * (NUM_TRAIN_TIMESTEPS / bell.sum())
