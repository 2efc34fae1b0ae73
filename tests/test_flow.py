"""The conversions of flow matching invert each other."""

import pytest
import torch

from longlive.flow import FlowSchedule, add_noise, flow_to_x0, x0_to_flow
from longlive.rollout import Sampler, SamplerConfig


def test_conversions_are_inverse() -> None:
    x0, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for sigma in (1.0, 0.6, 0.02):
        xt = add_noise(x0, noise, sigma)
        torch.testing.assert_close(flow_to_x0(noise - x0, xt, sigma), x0)
        torch.testing.assert_close(x0_to_flow(x0, xt, sigma), noise - x0, atol=1e-4, rtol=1e-4)


def test_sampler_follows_the_schedule() -> None:
    sampler = Sampler(SamplerConfig(steps=(1000, 750, 500, 250), warp=True, shift=5.0))
    assert sampler.timesteps == pytest.approx([1000.0, 937.5, 833.3333, 625.0], abs=1e-3)
    assert sampler.sigmas == pytest.approx([1.0, 0.9375, 0.83333, 0.625], abs=1e-5)
    assert Sampler(SamplerConfig(warp=False)).timesteps == [1000.0, 750.0, 500.0, 250.0]


def test_time_zero_finds_the_last_entry() -> None:
    schedule = FlowSchedule(5.0)
    assert schedule.sigma_at(torch.tensor([0.0])).item() == pytest.approx(0.00498, abs=1e-5)
