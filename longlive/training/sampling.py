"""Clips sampled from a bidirectional model: along the deterministic path from noise to data, or by its random walk.

Flow matching (arXiv 2210.02747) says how a state moves with the noise level: dx/dsigma = v(x, sigma). A causal student
learns from where this path ends, and from its states at the student's own denoising steps (CausVid, arXiv 2412.07772).
A walk with the same distribution at every noise level draws noise anew in every step, and so mends what earlier steps
did wrong (Song et al., arXiv 2011.13456; Karras et al., arXiv 2206.00364, section 4).
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from longlive.flow import NUM_TRAIN_TIMESTEPS, flow_to_x0, shift_sigma
from longlive.training.dmd import Score


@torch.no_grad()
def sample_clips(
    model: Score,
    noise: Tensor,
    text: Tensor,
    negative: Tensor,
    *,
    guidance: float,
    shift: float = 5.0,
    num_steps: int = 50,
    keep_sigmas: Sequence[float] = (),
    fresh_noise: Callable[[], Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Go from noise [B, F, C, h, w] to x0 of the same shape and type, float32 or float64.

    text, negative: the prompts and the negative ones [B, L, text_dim]; guidance: the model's flow is
    cond + guidance (cond - uncond), and 0 spares the second call. num_steps: uniform noise levels, warped by `shift`.
    keep_sigmas: S noise levels in (0, 1], descending, that become steps of the solver as well, so that the states
    there, returned as [B, S, F, C, h, w] (None without any), are points of the path and not interpolated.
    fresh_noise: draws noise as `noise`, for the random walk; None = the deterministic path.
    """
    assert all(a > b for a, b in pairwise((*keep_sigmas, 0.0))), keep_sigmas
    solver: _Ode | _Sde = _Ode() if fresh_noise is None else _Sde(fresh_noise)
    kept = []
    xt = noise
    for sigma, next_sigma in pairwise(noise_levels(shift, num_steps, keep_sigmas)):
        if sigma in keep_sigmas:
            kept.append(xt)
        timesteps = torch.full(noise.shape[:2], sigma * NUM_TRAIN_TIMESTEPS, device=noise.device)
        flow = model(xt, timesteps, text).to(xt.dtype)
        if guidance != 0.0:
            flow = flow + guidance * (flow - model(xt, timesteps, negative).to(xt.dtype))
        xt = solver.step(xt, flow, sigma, next_sigma)
    return xt, torch.stack(kept, dim=1) if kept else None


def noise_levels(shift: float, num_steps: int, keep_sigmas: Sequence[float] = ()) -> list[float]:
    """Noise levels from 1 to 0: `num_steps` warped uniform steps, and exactly those to keep between them."""
    warped = shift_sigma(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift).tolist()
    # Levels to keep come from float32 tables, so that those that are also steps may differ in the last digits.
    others = [sigma for sigma in warped if all(abs(sigma - keep) > 1e-6 for keep in keep_sigmas)]
    return sorted([*others, *keep_sigmas], reverse=True)


class _MidStep:
    """Extrapolates what a step begins with to its middle, by what the step before began with: of second order.

    A step much longer than the one before would magnify the difference of two values, rounding included: beyond twice,
    it extrapolates no further.
    """

    def __init__(self) -> None:
        self._previous: tuple[Tensor, float] | None = None

    def __call__(self, value: Tensor, length: float) -> Tensor:
        mean = value
        if self._previous is not None:
            previous, previous_length = self._previous
            mean = value + min(length / (2 * previous_length), 1.0) * (value - previous)
        self._previous = value, length
        return mean


class _Ode:
    """Adams-Bashforth of second order for steps of any length: Euler, with the flow extrapolated to mid-step.

    One model call a step, as Euler, for an error several times smaller at 50 steps.
    """

    def __init__(self) -> None:
        self._mid_step = _MidStep()

    def step(self, xt: Tensor, flow: Tensor, sigma: float, next_sigma: float) -> Tensor:
        length = next_sigma - sigma
        return xt + length * self._mid_step(flow, length)


class _Sde:
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095) in the terms of flow matching.

    With h the step in log((1 - sigma) / sigma), e^{-h} is the correlation of the noise at two levels; the rest of it is
    new. One model call a step, with x0 extrapolated to mid-step.
    """

    def __init__(self, fresh_noise: Callable[[], Tensor]) -> None:
        self._fresh_noise = fresh_noise
        self._mid_step = _MidStep()

    def step(self, xt: Tensor, flow: Tensor, sigma: float, next_sigma: float) -> Tensor:
        x0 = flow_to_x0(flow, xt, sigma)
        if next_sigma == 0.0:
            return x0
        correlation = next_sigma * (1 - sigma) / (sigma * (1 - next_sigma))
        length = -math.log(correlation) if correlation > 0 else math.inf
        new = 1 - correlation**2
        xt = correlation * next_sigma / sigma * xt + (1 - next_sigma) * new * self._mid_step(x0, length)
        return xt + next_sigma * math.sqrt(new) * self._fresh_noise()
