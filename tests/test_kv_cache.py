"""The ring cache against its plain twins: the published rolling buffer, and masked full attention."""

import itertools
from collections.abc import Callable

import pytest
import torch
from roll_twin import RollCache
from tiny import TINY_DIT, tiny_dit
from torch import Tensor

from longlive.models.dit import WanDiT
from longlive.models.kv_cache import CacheConfig, KVCache
from longlive.rollout import BlockTraining, Rollout, Sampler, SamplerConfig, recache

HEIGHT, WIDTH, CHANNELS = 4, 6, TINY_DIT.in_channels
GRID = (HEIGHT // 2, WIDTH // 2)
STEPS = SamplerConfig(steps=(1000, 500))
TOLERANCE = {"atol": 2e-5, "rtol": 0.0}


def prompt(seed: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randn(batch, TINY_DIT.text_len, TINY_DIT.text_dim, generator=generator)


def noise(start: int, num: int, step: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * start + step)
    return torch.randn(batch, num, CHANNELS, HEIGHT, WIDTH, generator=generator)


def ring_rollout(
    model: WanDiT,
    config: CacheConfig,
    num: int,
    blocks: int,
    switches: dict[int, int],
    policy: str,
    capacity: int | None,
) -> Tensor:
    cache = model.new_cache(config, 1, HEIGHT, WIDTH, capacity)
    rollout = Rollout(model, Sampler(STEPS), cache, policy)
    rollout.set_text(model.project_text(prompt(0)))
    latents = []
    for start in range(0, blocks * num, num):
        if start in switches:
            rollout.set_text(model.project_text(prompt(switches[start])))
        latents.append(rollout.next_block(noise(start, num, 0), lambda i, s=start: noise(s, num, i + 1)))
    return torch.cat(latents, dim=1)


@torch.no_grad()
def roll_rollout(
    model: WanDiT, config: CacheConfig, num: int, blocks: int, switches: dict[int, int], policy: str
) -> Tensor:
    """The published pipelines, with the rolling buffer."""
    sampler, cache = Sampler(STEPS), RollCache(config, TINY_DIT.num_layers, GRID, TINY_DIT.head_dim)
    text, latents = model.project_text(prompt(0)), torch.empty(1, 0, CHANNELS, HEIGHT, WIDTH)

    def call(x: Tensor, timestep: float, start: int, sink_recache: bool = False) -> Tensor:
        plan = cache.begin(start, x.shape[1], sink_recache)
        return model(x, torch.tensor([timestep]), text, cache=cache, plan=plan)

    for start in range(0, blocks * num, num):
        if start in switches:
            text = model.project_text(prompt(switches[start]))
            if policy == "rewrite":
                cache.zero_()
            recent = min(config.window_frames, start)
            call(latents[:, start - recent :], 0.0, start - recent, policy == "rewrite")
        xt = x0 = noise(start, num, 0)
        for step, (timestep, sigma) in enumerate(zip(sampler.timesteps, sampler.sigmas, strict=True)):
            xt = xt if step == 0 else (1 - sigma) * x0 + sigma * noise(start, num, step)
            x0 = xt - sigma * call(xt, timestep, start)
        call(x0, 0.0, start)
        latents = torch.cat([latents, x0], dim=1)
    return latents


GEOMETRIES = [(12, 3, 3), (9, 3, 3), (12, 0, 3), (12, 3, 4), (7, 2, 2), (6, 1, 1), (12, 3, 6), (10, 3, 3), (9, 4, 4)]


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("policy", ["keep", "rewrite"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_ring_equals_roll(geometry: tuple[int, int, int], policy: str, relative: bool) -> None:
    window, sink, num = geometry
    config, model = CacheConfig(window, sink, relative), tiny_dit()
    blocks = -(-3 * window // num)
    middle = (blocks // 2) * num
    switches = {num: 1, middle: 2, middle + num: 3}
    ring = ring_rollout(model, config, num, blocks, switches, policy, None)
    torch.testing.assert_close(ring, roll_rollout(model, config, num, blocks, switches, policy), **TOLERANCE)


@pytest.mark.parametrize("geometry", [(12, 6, 3), (12, 4, 3), (9, 5, 2)], ids=str)
def test_published_sink_fill_equals_roll(geometry: tuple[int, int, int]) -> None:
    window, sink, num = geometry
    model, blocks = tiny_dit(), 2 * window // num
    config = CacheConfig(window, sink, published_sink_fill=True)
    switches = {num: 1, (blocks - 2) * num: 2}
    for policy in ("keep", "rewrite"):
        ring = ring_rollout(model, config, num, blocks, switches, policy, None)
        torch.testing.assert_close(ring, roll_rollout(model, config, num, blocks, switches, policy), **TOLERANCE)
    clean_sink = ring_rollout(model, CacheConfig(window, sink), num, blocks, switches, policy, None)
    assert (clean_sink - ring).abs().max() > 1e-3


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("capacity", [13, 20, 33])
def test_larger_ring_sees_the_same(capacity: int, relative: bool) -> None:
    config, model, switches = CacheConfig(12, 3, relative), tiny_dit(), {6: 1, 24: 2}
    tight = ring_rollout(model, config, 3, 14, switches, "keep", None)
    roomy = ring_rollout(model, config, 3, 14, switches, "keep", capacity)
    torch.testing.assert_close(roomy, tight, **TOLERANCE)


def test_unlimited_window_grows() -> None:
    model, switches = tiny_dit(), {6: 1}
    unlimited = ring_rollout(model, CacheConfig(-1, 3), 3, 8, switches, "keep", None)
    wide = ring_rollout(model, CacheConfig(24, 3), 3, 8, switches, "keep", None)
    torch.testing.assert_close(unlimited, wide, **TOLERANCE)


def test_relative_positions_do_not_depend_on_the_frame_index() -> None:
    """Far into a video the relative model behaves as at its start: the same inputs and context give the same flow."""
    model, flows = tiny_dit(), []
    for offset in (0, 3_000_000):
        cache = model.new_cache(CacheConfig(6, 2, relative=True), 1, HEIGHT, WIDTH)
        text = model.project_text(prompt(0))
        zero = torch.zeros(1)
        model.remember(noise(0, 2, 0), zero, text, cache=cache, plan=cache.plan(0, 2))
        for index in range(4):
            start = 2 + 2 * index + offset
            flow = model(noise(2 + 2 * index, 2, 1), zero, text, cache=cache, plan=cache.plan(start, 2))
        flows.append(flow)
    torch.testing.assert_close(flows[0], flows[1], atol=1e-4, rtol=0.0)


def visible_mask(window: int, sink: int, num: int, context_frames: int, tokens: int) -> Tensor:
    """Which key frames each query frame sees when clean context frames and one noisy block stand in a row.

    A clean frame sees its own block and, before it, sink and window; the block at the end sees the same of the context.
    """
    total = context_frames + num
    frames = torch.arange(total)
    end = (frames // num + 1) * num
    seen = frames[None, :] < end[:, None]
    recent = frames[None, :] >= end[:, None] - (window - sink)
    return (seen & (recent | (frames[None, :] < sink))).repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)


def masked_attention(mask: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Softmax attention with a mask, spelled out in float64."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q.double() @ k.double().mT / q.shape[-1] ** 0.5
        return (scores.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ v.double()).to(q.dtype)

    return attention


@pytest.mark.parametrize(("window", "sink", "num"), [(6, 2, 2), (9, 3, 3), (5, 0, 1), (8, 3, 4)])
def test_streaming_equals_masked_full_attention(window: int, sink: int, num: int) -> None:
    """One call over the whole video with a block mask gives, for the last block, what the cached stream gives."""
    model, text = tiny_dit(), prompt(0)
    cache = model.new_cache(CacheConfig(window, sink), 1, HEIGHT, WIDTH)
    blocks = 2 * window // num + 1
    clean = noise(0, blocks * num, 7)
    tokens = cache.frame_tokens
    for start in range(0, blocks * num, num):
        plan, xt = cache.plan(start, num), noise(start, num, 8)
        cached = model(xt, torch.tensor([700.0]), text, cache=cache, plan=plan)
        sequence = torch.cat([clean[:, :start], xt], dim=1)
        timesteps = torch.cat([torch.zeros(1, start), torch.full((1, num), 700.0)], dim=1)
        attention = masked_attention(visible_mask(window, sink, num, start, tokens))
        full = model(sequence, timesteps, text, attention=attention)
        torch.testing.assert_close(cached, full[:, start:], **TOLERANCE)
        timesteps = torch.zeros(1)
        model.remember(clean[:, start : start + num], timesteps, text, cache=cache, plan=plan)


def test_published_training_policy_leaves_a_zero_sink() -> None:
    model, config = tiny_dit(), CacheConfig(12, 3)
    tokens = GRID[0] * GRID[1]
    for num_frames, is_zero in ((24, True), (21, False)):
        cache: KVCache = model.new_cache(config, 1, HEIGHT, WIDTH, capacity_frames=33)
        text = model.project_text(prompt(0))
        for start in range(0, num_frames, 3):
            model.remember(noise(start, 3, 0), torch.zeros(1), text, cache=cache, plan=cache.plan(start, 3))
        recent = noise(0, num_frames, 1)[:, -21:]
        recache(model, recent, num_frames, text, cache, "published_training")
        keys = torch.stack([layer.k for layer in cache.layers])
        sink = keys[:, :, :, : 3 * tokens]
        assert (sink == 0).all() == is_zero
        ring = keys[:, :, :, 3 * tokens : 12 * tokens]
        assert (ring != 0).any(dim=-1).all()


@pytest.mark.parametrize(("window", "sink"), [(3, 3), (2, 5), (0, 0)])
def test_impossible_geometry(window: int, sink: int) -> None:
    with pytest.raises(ValueError, match="window_frames"):
        CacheConfig(window, sink)


def test_slots_of_visible_frames_are_distinct() -> None:
    model = tiny_dit()
    for window, sink, num in itertools.product((6, 7), (0, 2), (1, 2, 3)):
        cache = model.new_cache(CacheConfig(window, sink), 1, HEIGHT, WIDTH)
        for start in range(0, 30, num):
            newest = range(max(sink, start + num - (window - sink)), start + num)
            slots = cache._slots(torch.tensor([*range(min(sink, start + num)), *newest])).tolist()
            assert len(set(slots)) == len(slots)
            assert max(slots) < window


@pytest.mark.parametrize("exit_step", [0, 1])
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("geometry", [(12, 3, 3), (9, 2, 4), (8, 3, 2), (12, 6, 3), (6, 0, 2), (12, 4, 4)], ids=str)
def test_passes_with_gradient_see_the_same(geometry: tuple[int, int, int], published: bool, exit_step: int) -> None:
    """A training rollout whose exit step has a gradient makes the frames of one without."""
    window, sink, num = geometry
    model, text = tiny_dit(), prompt(0)
    latents = []
    for embeds in (None, text):
        config = CacheConfig(window, sink, published_sink_fill=published)
        rollout = Rollout(model, Sampler(STEPS), model.new_cache(config, 1, HEIGHT, WIDTH, 3 * window))
        rollout.set_text(model.project_text(text))
        training = BlockTraining(exit_step, None if embeds is None else model, embeds)
        blocks = [
            rollout.next_block(noise(start, num, 0), lambda i, s=start: noise(s, num, i + 1), training)
            for start in range(0, 2 * window, num)
        ]
        latents.append(torch.cat(blocks, dim=1))
    torch.testing.assert_close(latents[0], latents[1], **TOLERANCE)
