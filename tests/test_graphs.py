"""Passes replayed as CUDA graphs are the model's own."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from longlive.graphs import GraphedModule, GraphedPasses
from longlive.models.kv_cache import CacheConfig
from longlive.rollout import Rollout, Sampler, SamplerConfig
from tests.tiny import TINY_DIT, tiny_dit

pytestmark = pytest.mark.gpu

BATCH, LATENT = 2, (TINY_DIT.in_channels, 4, 6)
SAMPLER = Sampler(SamplerConfig(steps=(1000, 500), frames_per_block=2))


def inputs(seed: int, num_frames: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and prompts on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(BATCH, TINY_DIT.text_len, TINY_DIT.text_dim, generator=generator)
    latents = torch.randn(BATCH, num_frames, *LATENT, generator=generator)
    return latents.cuda(), torch.rand(BATCH, 1, generator=generator).cuda() * 1000, text.cuda()


def test_calls_with_gradient_are_the_modules_own() -> None:
    model = tiny_dit().cuda().requires_grad_(True)
    graphed = GraphedModule(model)

    def output_and_gradients(call: Callable[..., Tensor], seed: int) -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        out = call(*inputs(seed))
        out.square().mean().backward()
        return [out.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    for seed in range(3):
        torch.testing.assert_close(output_and_gradients(model, seed), output_and_gradients(graphed, seed))


def test_calls_of_other_shapes_and_without_gradient() -> None:
    model = tiny_dit().cuda().requires_grad_(True)
    graphed = GraphedModule(model)
    with torch.no_grad():
        outs = [graphed(*inputs(seed, num_frames)) for seed, num_frames in ((0, 4), (1, 2), (2, 4))]
        for out, (seed, num_frames) in zip(outs, ((0, 4), (1, 2), (2, 4)), strict=True):
            torch.testing.assert_close(out, model(*inputs(seed, num_frames)))
    assert graphed(*inputs(0)).requires_grad


@pytest.mark.parametrize("capacity", [None, 9])
@pytest.mark.parametrize("relative", [False, True])
def test_rollouts_are_the_models_own(capacity: int | None, relative: bool) -> None:
    """Through a turning ring, a prompt switch with its recache, and new weights."""
    model = tiny_dit().cuda()
    passes = GraphedPasses(model)
    config = CacheConfig(window_frames=5, sink_frames=1, relative=relative)
    caches = [model.new_cache(config, BATCH, *LATENT[1:], capacity) for _ in range(2)]
    for scale in (1.0, 0.5):
        with torch.no_grad():
            model.head.head.weight.mul_(scale)
        made = []
        for cache, own in zip(caches, (model, passes), strict=True):
            cache.zero_()
            rollout = Rollout(own, SAMPLER, cache)
            blocks = []
            for number in range(7):
                if number in (0, 4):
                    with torch.no_grad():
                        rollout.set_text(model.project_text(inputs(10 + number)[2]))
                noise, fresh = inputs(number, 2)[0], inputs(100 + number, 2)[0]
                blocks.append(rollout.next_block(noise, lambda step, fresh=fresh: fresh))
            made.append(torch.cat(blocks, dim=1))
        torch.testing.assert_close(made[0], made[1])
