"""One pass with gradient over all blocks of a clip is the same as a pass for each block."""

from functools import partial

import pytest
import torch
from torch import Tensor

from longlive.graphs import GraphedModule, GraphedPasses
from longlive.models.attention import sdpa
from longlive.models.dit import WanDiT
from longlive.models.kv_cache import CacheConfig
from longlive.rollout import Passes, Rollout, Sampler, SamplerConfig, SwitchPolicy
from longlive.training.clip_pass import ClipPass
from longlive.training.streaming import ChunkNoise, StreamingSequence
from tests.tiny import TINY_DIT, tiny_dit

BATCH, LATENT = 2, (TINY_DIT.in_channels, 4, 6)


def train_chunks(
    trained: WanDiT | ClipPass,
    model: WanDiT,
    config: CacheConfig,
    block: int,
    switch: int | None,
    policy: SwitchPolicy,
    device: str = "cpu",
    num_blocks: int = 3,
    num_chunks: int = 4,
    passes: Passes | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Frames and gradients of the chunks of a sequence. passes: of the rollout, by default the model's own."""
    length = num_blocks * block
    capacity = max(config.window_frames - block + length, config.sink_frames + 1)
    cache = model.new_cache(config, BATCH, *LATENT[1:], capacity)
    generator = torch.Generator().manual_seed(1)
    normal = partial(torch.randn, generator=generator)
    prompts = [
        normal(BATCH, TINY_DIT.text_len, TINY_DIT.text_dim).to(device) for _ in range(1 if switch is None else 2)
    ]
    sampler = Sampler(SamplerConfig(steps=(1000, 500), frames_per_block=block))
    sequence = StreamingSequence(Rollout(passes or model, sampler, cache, policy), prompts, switch, trained)
    made, gradients = [], []
    for number in range(num_chunks):
        shape = (BATCH, length, *LATENT)
        exits = [(number + index) % 2 for index in range(num_blocks)]
        noise = ChunkNoise(normal(shape).to(device), [normal(shape).to(device)], None, exits)
        frames = sequence.generate(noise)
        (frames * normal(shape).to(device)).sum().backward()
        made.append(frames.detach())
        gradients += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
    return made, gradients


GEOMETRIES = [(12, 3, 3), (6, 3, 3), (6, 0, 3), (8, 3, 2), (9, 2, 4), (12, 6, 3), (7, 1, 2), (12, 4, 4)]


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(("switch", "policy"), [(None, "keep"), (1, "keep"), (1, "rewrite"), (5, "keep"), (5, "none")])
def test_frames_and_gradients_are_those_of_a_pass_for_each_block(
    geometry: tuple[int, int, int], switch: int | None, policy: SwitchPolicy, relative: bool
) -> None:
    """switch: before this block."""
    window, sink, block = geometry
    model = tiny_dit().requires_grad_(True)
    config = CacheConfig(window, sink, relative)
    frame = None if switch is None else switch * block
    made, gradients = train_chunks(ClipPass(model, block, sdpa), model, config, block, frame, policy)
    expected, expected_gradients = train_chunks(model, model, config, block, frame, policy)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-3, atol=1e-4)


def test_unlimited_window() -> None:
    """A window of 12 is never full here."""
    model = tiny_dit().requires_grad_(True)
    run = partial(train_chunks, model=model, block=2, switch=None, policy="keep", num_blocks=2, num_chunks=3)
    unlimited = run(ClipPass(model, 2, sdpa), config=CacheConfig(-1, 2))
    torch.testing.assert_close(unlimited, run(model, config=CacheConfig(12, 2)), rtol=1e-3, atol=1e-4)


def test_a_ring_that_has_lost_what_a_block_sees() -> None:
    model = tiny_dit()
    cache = model.new_cache(CacheConfig(12, 3), BATCH, *LATENT[1:], capacity_frames=18)
    assert cache.plan_clip_gradient(24, 9, 3).past is not None
    with pytest.raises(AssertionError, match="has lost"):
        model.new_cache(CacheConfig(12, 3), BATCH, *LATENT[1:], capacity_frames=17).plan_clip_gradient(24, 9, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("switch", [None, 9])
def test_replayed_as_graphs(switch: int | None, relative: bool) -> None:
    model = tiny_dit().cuda().requires_grad_(True)
    config = CacheConfig(6, 3, relative)
    run = partial(train_chunks, model=model, config=config, block=3, switch=switch, policy="keep", device="cuda")
    with torch.backends.cudnn.flags(allow_tf32=False):
        replayed = run(ClipPass(model, 3, sdpa, GraphedModule), passes=GraphedPasses(model))
        torch.testing.assert_close(replayed, run(model), rtol=1e-3, atol=1e-4)
