"""Training in one process: what every stage learns, and the numerics under it."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from tiny import TINY_DIT, tiny_dit
from torch import Tensor, nn
from training_world import (
    CPU,
    LATENT,
    LORA,
    PROMPTS,
    TARGET,
    Pull,
    Setup,
    cache_of,
    draw_at,
    embed,
    sampler_of,
    training,
)

from longlive.data.clips import LatentPool
from longlive.flow import add_noise
from longlive.models.attention import sdpa
from longlive.models.dit import WanDiT
from longlive.models.kv_cache import CacheConfig
from longlive.rollout import Rollout, constant_timesteps
from longlive.training.checkpoint import read_state
from longlive.training.clip_pass import ClipPass
from longlive.training.distribution_matching import DistributionMatching, Streaming
from longlive.training.draw import Draw
from longlive.training.flow_matching import CausalInit, FlowMatching, mean_square
from longlive.training.parallel import copy_weights, local, whole
from longlive.training.streaming import ChunkNoise, StreamingSequence
from longlive.training.teacher_forcing import TeacherForced
from longlive.training.trainer import EMAConfig, Network, NonFiniteError, OptimizerConfig, Trainer
from longlive.weights.lora import attach_lora

# Steps that become small let two networks that chase each other settle.
FAST = OptimizerConfig(lr=1e-2, betas=(0.0, 0.99), max_grad_norm=1.0, final_lr_ratio=0.0)
SLOWER = replace(FAST, lr=4e-3)
FASTER = replace(FAST, lr=1.5e-2)
STILL = OptimizerConfig(lr=0.0)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def values(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of sharded tensors, whole."""
    return {name: whole(tensor).detach().clone() for name, tensor in parameters.items()}


def gradients(network: Network) -> dict[str, Tensor]:
    return values({name: p.grad for name, p in network.parameters.items() if p.grad is not None})


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Equal up to a share of each tensor's norm."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= tolerance * tensor.norm() + 1e-9, name


# --- each stage learns ------------------------------------------------------------------------------------------------


@torch.no_grad()
def loss_of(trainer: Trainer, network: str, num: int = 4) -> float:
    """The mean loss at places in training that are always the same."""
    size = trainer.config.batch_size
    return sum(trainer.stage.loss(network, draw_at(size * n, size)).value.item() for n in range(num)) / num


@torch.no_grad()
def denoising_error(trainer: Trainer, setup: Setup) -> float:
    """How far the generator's x0 is from the clips, at the noise level of the last denoising step."""
    stage = trainer.stage
    assert isinstance(stage, FlowMatching)
    items = list(range(len(PROMPTS)))
    x0, text = stage.clips.batch(items).latents, embed([PROMPTS[item][0] for item in items])
    sigma, timestep = sampler_of(setup).sigmas[-1], sampler_of(setup).timesteps[-1]
    xt = add_noise(x0, draw_at(0, len(items)).normal(*x0.shape[1:]), sigma)
    timesteps = torch.full(x0.shape[:2], timestep)
    if isinstance(stage, CausalInit):
        flow = stage.generator(xt, x0, timesteps, text)
    else:
        flow = stage.generator(xt, timesteps, text)
    return (xt - sigma * flow - x0).square().mean().item()


@torch.no_grad()
def videos(stage: DistributionMatching) -> Tensor:
    """What the generator makes now of all prompts, [5, 12, ...], with a switch in the middle."""
    model, size, num = stage.players.rollout, len(PROMPTS), stage.sampler.config.frames_per_block
    rollout = Rollout(model, stage.sampler, model.new_cache(stage.config.cache, size, *LATENT[1:]))
    blocks = []
    for half, texts in enumerate(zip(*PROMPTS, strict=True)):
        rollout.set_text(model.project_text(embed(texts)))
        for start in range(6 * half, 6 * half + 6, num):
            draw = draw_at(100 * start, size)
            fresh = [draw.of(f"renoise {step}").normal(num, *LATENT) for step in range(len(stage.sampler.timesteps))]
            blocks.append(rollout.next_block(draw.normal(num, *LATENT), fresh.__getitem__))
    return torch.cat(blocks, dim=1)


@torch.no_grad()
def critic_error(stage: DistributionMatching) -> float:
    """How far the critic's x0 is from the generator's samples, in the middle of the noise levels."""
    samples = videos(stage)[:, : stage.config.num_frames]
    noise = draw_at(0, len(samples)).normal(*samples.shape[1:])
    noised = stage.dmd.noised(samples, torch.full((len(samples), 1), 300.0), noise)
    text = embed([before for before, _ in PROMPTS])
    return (stage.dmd.predict_x0(stage.players.critic, noised, text) - samples).square().mean().item()


@pytest.mark.parametrize("has_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("stage", "has_trajectories"), [("pretrain", False), ("causal_init", False), ("causal_init", True)]
)
def test_clips_are_learnt(tmp_path: Path, stage: str, has_trajectories: bool, has_lora: bool) -> None:
    setup = Setup(
        stage, num_steps=25, batch_size=2, has_lora=has_lora, generator=FAST, has_trajectories=has_trajectories
    )
    with training(setup, tmp_path) as trainer:
        before = loss_of(trainer, "generator"), denoising_error(trainer, setup)
        assert trainer.fit()
        after = loss_of(trainer, "generator"), denoising_error(trainer, setup)
    for one, other in zip(after, before, strict=True):
        assert one < (0.75 if has_lora else 0.5) * other, (before, after)


@pytest.mark.parametrize(("stage", "has_lora"), [("self_forcing", False), ("streaming", False), ("streaming", True)])
def test_samples_come_to_what_the_teacher_wants(tmp_path: Path, stage: str, has_lora: bool) -> None:
    generator = FASTER if has_lora else SLOWER
    setup = Setup(stage, num_steps=30, batch_size=2, has_lora=has_lora, generator=generator, critic=SLOWER)
    with training(setup, tmp_path) as trainer:
        assert isinstance(trainer.stage, DistributionMatching)
        before = (videos(trainer.stage) - TARGET).square().mean().item()
        assert trainer.fit()
        after = (videos(trainer.stage) - TARGET).square().mean().item()
        if isinstance(trainer.stage, Streaming):
            assert trainer.stage.num_items_used > 2 * setup.batch_size  # sequences end and begin on the way
    assert after < (0.65 if has_lora else 0.5) * before, (before, after)


@pytest.mark.parametrize(("stage", "has_lora"), [("self_forcing", False), ("streaming", True)])
def test_the_critic_learns_the_samples(tmp_path: Path, stage: str, has_lora: bool) -> None:
    setup = Setup(
        stage,
        num_steps=24,
        batch_size=2,
        has_lora=has_lora,
        generator=STILL,
        critic=FAST,
        critic_steps_per_generator_step=100,
    )
    with training(setup, tmp_path) as trainer:
        assert isinstance(trainer.stage, DistributionMatching)
        before = loss_of(trainer, "critic"), critic_error(trainer.stage)
        assert trainer.fit()
        after = loss_of(trainer, "critic"), critic_error(trainer.stage)
    for one, other in zip(after, before, strict=True):
        assert one < 0.8 * other, (before, after)


# --- teacher forcing is the cache -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "sink", "block"),
    [(12, 3, 3), (4, 1, 1), (4, 1, 2), (5, 3, 1), (7, 4, 2), (3, 0, 3), (8, 3, 2), (-1, 2, 2)],
)
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("context_timestep", [0.0, 100.0])
def test_teacher_forcing_sees_what_the_cache_shows(
    window: int, sink: int, block: int, context_timestep: float, relative: bool
) -> None:
    model, config, num_frames = tiny_dit(), CacheConfig(window, sink, relative), 24
    clean, noisy = torch.randn(2, 2, num_frames, *LATENT)
    text = embed(["one", "two"])
    timesteps = (torch.rand(2, num_frames // block) * 1000).repeat_interleave(block, dim=1)
    flow = TeacherForced(model, config, block, context_timestep, sdpa)(noisy, clean, timesteps, text)
    cache = model.new_cache(config, 2, *LATENT[1:])
    for start in range(0, num_frames, block):
        own = slice(start, start + block)
        plan = cache.plan(start, block)
        expected = model(noisy[:, own], timesteps[:, own], text, cache=cache, plan=plan)
        torch.testing.assert_close(flow[:, own], expected, **CLOSE)
        model.remember(
            clean[:, own], constant_timesteps(clean, context_timestep), text, cache=cache, plan=cache.plan(start, block)
        )


def test_a_past_that_is_off_is_seen_and_not_learnt(tmp_path: Path) -> None:
    with training(Setup(stage="causal_init"), tmp_path) as trainer:
        stage = trainer.stage
        assert isinstance(stage, CausalInit)
        clips = stage.clips.batch(range(len(PROMPTS)))
        stage.clips = LatentPool(clips.prompts, clips.latents, past := torch.randn_like(clips.latents))
        loss = stage.loss("generator", draw_at(0)).value
        (item,) = (stage.order[sample] for sample in draw_at(0).samples)
        x0, noise = clips.latents[[item]], draw_at(0).of("noise").normal(*clips.latents.shape[1:])
        sigma = stage._noise_levels(draw_at(0).of("timestep"), x0.shape[1] // 2).repeat_interleave(2, dim=1)
        noisy, text = add_noise(x0, noise, sigma[..., None, None, None]), stage.encode_prompts([clips.prompts[item]])
        if draw_at(0).of("dropout").uniform(1, 1) < stage.config.prompt_dropout:
            text = stage.negative
        flow = stage.generator(noisy, past[[item]], 1000 * sigma, text)
        first = torch.full((len(PROMPTS),), 2)
        stage.clips = LatentPool(clips.prompts, clips.latents, past, first)
        later = stage.loss("generator", draw_at(0)).value
    torch.testing.assert_close(loss, (flow - (noise - x0)).square().mean())
    torch.testing.assert_close(later, (flow - (noise - x0))[:, 2:].square().sum() / flow.numel())


def test_frames_before_those_that_are_learnt_do_not_count() -> None:
    errors = torch.randn(2, 3, 1, 2, 2)
    expected = (errors[0].square().sum() + errors[1, 2:].square().sum()) / errors.numel()
    torch.testing.assert_close(mean_square(errors, torch.tensor([0, 2])), expected)
    torch.testing.assert_close(mean_square(errors, None), errors.square().mean())


# --- activations computed again ---------------------------------------------------------------------------------------


def chunks_with_gradient(setup: Setup, folder: Path) -> tuple[list[float], list[dict[str, Tensor]]]:
    """The generator's loss and gradients on three chunks, its weights updated between them."""
    losses, found = [], []
    with training(setup, folder) as trainer:
        network = trainer.networks["generator"]
        for step in range(3):
            loss = trainer.stage.loss("generator", draw_at(step)).value
            loss.backward()
            losses.append(loss.item())
            found.append(gradients(network))
            network.update(step, 3)
            trainer.stage.updated("generator")
    return losses, found


@pytest.mark.parametrize(("policy", "has_lora"), [("keep", False), ("rewrite", True)])
def test_what_is_computed_again_is_the_same(tmp_path: Path, policy: str, has_lora: bool) -> None:
    """The window is shorter than a chunk, so that the ring goes round between a pass and its backward pass."""
    results = {}
    for remat in ("none", "selective", "full"):
        setup = Setup(
            "streaming",
            remat=remat,  # type: ignore[arg-type]
            has_lora=has_lora,
            window=3,
            block=1,
            min_new_frames=5,
            max_frames=16,
            switches=(13,),
            policy=policy,  # type: ignore[arg-type]
        )
        results[remat] = chunks_with_gradient(setup, tmp_path)
    losses, found = results["none"]
    assert all(any(g.abs().sum() > 0 for g in chunk.values()) for chunk in found)
    for other in ("selective", "full"):
        assert results[other][0] == losses
        for one, same in zip(results[other][1], found, strict=True):
            assert_same(one, same)


# --- the plain copy that rolls out ------------------------------------------------------------------------------------


def after_steps(trainer: Trainer, num: int) -> None:
    for _ in range(num):
        trainer.read(trainer.step())
        trainer.progress.step += 1


def random_inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, *LATENT), torch.rand(2, 4) * 1000, embed(["one", "two"])


@pytest.mark.parametrize("has_lora", [False, True])
def test_the_copy_is_the_trained_model(tmp_path: Path, has_lora: bool) -> None:
    with training(Setup(has_lora=has_lora, generator=FAST), tmp_path) as trainer:
        stage, network = trainer.stage, trainer.networks["generator"]
        assert isinstance(stage, DistributionMatching)
        begin = values(dict(stage.players.rollout.named_parameters()))
        after_steps(trainer, 3)
        copied = values(dict(stage.players.rollout.named_parameters()))
        assert any(not torch.equal(begin[name], tensor) for name, tensor in copied.items())
        inputs = random_inputs()
        with torch.no_grad():
            torch.testing.assert_close(stage.players.rollout(*inputs), network.module(*inputs), **CLOSE)
        if not has_lora:
            assert_same(copied, values(dict(network.module.named_parameters())))


@pytest.mark.parametrize("has_lora", [False, True])
def test_the_average_begins_late_and_then_decays(tmp_path: Path, has_lora: bool) -> None:
    setup = Setup("pretrain", has_lora=has_lora, generator=FAST, ema=EMAConfig(decay=0.75, start_step=3))
    with training(setup, tmp_path) as trainer:
        network = trainer.networks["generator"]
        expected: dict[str, Tensor] = {}
        for step in range(5):
            after_steps(trainer, 1)
            now = values(network.parameters)  # type: ignore[arg-type]
            expected = now if step < 2 else {name: 0.75 * expected[name] + 0.25 * now[name] for name in now}
            averaged = values(network.averaged)
            assert averaged.keys() == dict(network.module.named_parameters()).keys()
            assert_close({name: averaged[name] for name in expected}, expected, 1e-6 if step >= 2 else 0)
        copy = WanDiT(TINY_DIT).requires_grad_(False)
        copy_weights(copy, network.averaged, LORA.scale)
        plain = plain_twin(network, has_lora)
        plain.load_state_dict(averaged)
        torch.testing.assert_close(copy(*(inputs := random_inputs())), plain(*inputs), **CLOSE)
        assert (copy(*inputs) - network.module(*inputs)).abs().max() > 1e-2


def plain_twin(network: Network, has_lora: bool) -> WanDiT:
    """The trained model on one process, not sharded, with peft's own layers."""
    plain = WanDiT(TINY_DIT)
    if has_lora:
        attach_lora(plain, LORA.rank, LORA.alpha)
    plain.load_state_dict(values(dict(network.module.named_parameters())))
    return plain.eval()


@pytest.mark.parametrize("has_lora", [False, True])
@pytest.mark.parametrize("in_one_pass", [False, True])
def test_rolling_out_on_a_copy_changes_nothing(tmp_path: Path, has_lora: bool, in_one_pass: bool) -> None:
    """Samples and gradients are those of one plain model that makes all passes; a switch in the second chunk."""
    setup = Setup("streaming", batch_size=2, has_lora=has_lora, generator=FAST)
    with training(setup, tmp_path) as trainer:
        after_steps(trainer, 2)
        stage, network = trainer.stage, trainer.networks["generator"]
        assert isinstance(stage, Streaming)
        plain = plain_twin(network, has_lora)
        rollout = Rollout(plain, sampler_of(setup), plain.new_cache(cache_of(setup), 2, 4, 4, 12))
        prompts = [embed(["one", "two"]), embed(["three", "four"])]
        module = cast(WanDiT, network.module)
        trained = ClipPass(module, setup.block, sdpa) if in_one_pass else module
        ours = StreamingSequence(stage._new_rollout(2), prompts, 8, trained)
        theirs = StreamingSequence(rollout, prompts, 8)
        for exits in ([0, 1, 1], [1, 1, 0]):
            shape = (2, setup.block * len(exits), *LATENT)
            noise = ChunkNoise(torch.randn(shape), [torch.randn(shape)], None, exits)
            made, expected = ours.generate(noise), theirs.generate(noise)
            torch.testing.assert_close(made, expected, **CLOSE)
            cotangent = torch.randn(shape)
            for samples in (made, expected):
                (samples * cotangent).sum().backward()
        expected_grads = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
        assert_close(gradients(network), expected_grads)


# --- random numbers ---------------------------------------------------------------------------------------------------


def test_numbers_do_not_depend_on_how_the_batch_is_cut() -> None:
    def cut(rank: int, batch_size: int) -> Draw:
        return Draw(3, 24, num_samples=4, offset=rank * batch_size, batch_size=batch_size, device=CPU)

    for take in (
        lambda draw: draw.normal(2, 3),
        lambda draw: draw.of("noise").uniform(5),
        lambda draw: draw.of("a").of("b").integers(1000, 4),
    ):
        whole_batch = take(cut(0, 4))
        assert whole_batch.shape[0] == 4
        assert torch.equal(whole_batch, torch.cat([take(cut(rank, 2)) for rank in range(2)]))
        assert torch.equal(whole_batch, torch.cat([take(cut(rank, 1)) for rank in range(4)]))
        assert len({tuple(row.flatten().tolist()) for row in whole_batch}) == 4
    shared = {cut(rank, size).of("exit").shared.random() for size in (1, 2, 4) for rank in range(4 // size)}
    assert len(shared) == 1
    assert [*cut(1, 2).samples] == [26, 27]


def test_other_purposes_places_and_seeds_have_other_numbers() -> None:
    draws = [
        Draw(seed, position, 1, 0, 1, CPU).of(purpose)
        for seed, position, purpose in itertools.product((0, 1), (0, 1, 10**9), ("", "noise", "noise 1"))
    ]
    assert len({draw.normal(4) for draw in draws}) == len(draws)
    for take in (lambda draw: draw.normal(1).item(), lambda draw: draw.shared.random()):
        taken = [take(draw) for draw in draws]
        assert len(set(taken)) == len(draws)
        assert taken == [take(draw) for draw in draws]


def test_numbers_are_distributed_as_they_should_be() -> None:
    draw = Draw(0, 0, 1, 0, 1, CPU)
    normal, uniform, integers = draw.normal(20_000), draw.uniform(20_000), draw.integers(7, 20_000)
    assert normal.mean().abs() < 0.03
    assert abs(normal.std() - 1) < 0.03
    assert 0 <= uniform.min() < 0.001
    assert 0.999 < uniform.max() < 1
    assert integers.unique().tolist() == list(range(7))


def test_samples_split_into_several_have_numbers_of_their_own() -> None:
    together = replace(draw_at(4, 2), num_samples=4, offset=2).split(3)
    assert together.samples == range(18, 24)
    alone = replace(draw_at(4), num_samples=4, offset=3).split(3)
    assert torch.equal(together.normal(5)[3:], alone.normal(5))
    numbers = torch.cat([together.normal(5), draw_at(18, 6).normal(5)])
    assert len(numbers.unique()) == numbers.numel()


# --- one step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["pretrain", "self_forcing"])
def test_rounds_are_a_larger_batch(tmp_path: Path, stage: str) -> None:
    """What is drawn for a sample does not depend on the rounds, except for the exit step, which is the last here."""
    results = []
    for batch_size, num_rounds in ((2, 1), (1, 2)):
        setup = Setup(stage, batch_size=batch_size, num_rounds=num_rounds, last_step_only=True)
        with training(setup, tmp_path / str(num_rounds)) as trainer:
            logged = trainer.read(trainer.step())
            logged = {name: value for name, value in logged.items() if not name.startswith(("time/", "throughput/"))}
            # With a first beta of 0 the first moment is the gradient that was taken.
            moments = trainer.networks["generator"].state()["optimizer"]
            results.append((logged, values({name: moment["exp_avg"] for name, moment in moments.items()})))
    (logged, taken), (other_logged, other_taken) = results
    assert logged == pytest.approx(other_logged, rel=1e-5)
    assert logged["data/samples"] == 2
    assert_close(other_taken, taken, 1e-5)


def test_learning_rate() -> None:
    config = OptimizerConfig(lr=2.0, warmup_steps=3, final_lr_ratio=0.2)
    rates = [config.share_at(step, 1_000_000) for step in range(5)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert [config.share_at(step, 100) for step in (50, 100)] == pytest.approx([0.2 + 0.8 / 2, 0.2])
    assert config.share_at(25, 100) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    constant = OptimizerConfig(lr=2.0)
    assert {constant.share_at(step, 100) for step in range(100)} == {1.0}


def test_an_update_takes_the_learning_rate_and_clips(tmp_path: Path) -> None:
    config = OptimizerConfig(lr=1e-2, betas=(0.0, 0.999), weight_decay=0.0, max_grad_norm=0.5, warmup_steps=3)
    with training(Setup("pretrain", generator=config), tmp_path) as trainer:
        network = trainer.networks["generator"]
        begin = values(network.parameters)  # type: ignore[arg-type]
        for scale, is_clipped in ((1.0, True), (1e-4, False)):
            (scale * trainer.stage.loss("generator", draw_at(0)).value).backward()
            before = torch.cat([g.flatten() for g in gradients(network).values()])
            norm = network.update(0, 10).values.norm().item()
            # With a first beta of 0 the first moment is the gradient that was taken.
            taken = [whole(network.optimizer.state[p]["exp_avg"]) for p in network.parameters.values()]
            after = torch.cat([moment.flatten() for moment in taken])
            assert norm == pytest.approx(before.norm().item(), rel=1e-5)
            assert (norm > 0.5) == is_clipped
            torch.testing.assert_close(after, before * (0.5 / norm if is_clipped else 1), rtol=1e-4, atol=1e-8)
            assert network.optimizer.param_groups[0]["lr"] == 0.25e-2
            assert not gradients(network)
            if is_clipped:  # Adam's first step: everything moves by the learning rate
                now = values(network.parameters)  # type: ignore[arg-type]
                step = torch.cat([(now[name] - begin[name]).abs().flatten() for name in now])
                assert step.max().item() == pytest.approx(0.25e-2, rel=1e-3)


# --- what is not a number ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_no_number_is_named(tmp_path: Path, value: float) -> None:
    with training(Setup("pretrain"), tmp_path) as trainer:
        network = trainer.networks["generator"]
        after_steps(trainer, 1)
        trainer.stage.loss("generator", draw_at(0)).value.backward()
        bad = network.parameters["blocks.1.ffn.0.weight"].grad
        assert bad is not None
        local(bad)[3, 4] = value
        norms = network.update(1, 10)
        bad_names = [name for name, norm in zip(norms.names, norms.values, strict=True) if not norm.isfinite()]
        assert bad_names == ["blocks.1.ffn.0.weight"]


def trainer_values(trainer: Trainer) -> dict[str, Tensor]:
    """All tensors that training changes."""
    found: dict[str, Tensor] = {}
    for name, network in trainer.networks.items():
        state = network.state()
        for part in ("weights", "ema"):
            found |= {f"{name}.{part}.{key}": tensor for key, tensor in state.get(part, {}).items()}
        for key, moments in state["optimizer"].items():
            found |= {f"{name}.optimizer.{key}.{moment}": tensor for moment, tensor in moments.items()}
    return values(found)


def poison_critic(trainer: Trainer) -> None:
    """From now on the gradient at the critic's output is NaN, its loss is not."""

    def poisoned(module: nn.Module, inputs: object, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * torch.nan)

    trainer.networks["critic"].module.head.register_forward_hook(poisoned)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ("teacher", "step 3: generator: loss is NaN or infinite"),
        ("critic", r"step 3: critic: gradient of \S+, \S+, \S+ is NaN or infinite"),
    ],
    ids=["teacher", "critic"],
)
def test_a_run_that_broke_says_where_and_keeps_its_checkpoint(tmp_path: Path, bad: str, match: str) -> None:
    # The teacher is asked twice in a step, with the prompt and without.
    teacher = Pull(breaks_at=5 if bad == "teacher" else None)
    setup = Setup(num_steps=5, save_interval=2, critic_steps_per_generator_step=1, teacher=teacher)
    with training(setup, tmp_path) as trainer:
        good: dict[str, Tensor] = {}

        def sample(step: int) -> None:
            good.update(trainer_values(trainer))
            if bad == "critic":
                poison_critic(trainer)

        trainer.sample = sample
        trainer.config = replace(trainer.config, sample_interval=2)
        with pytest.raises(NonFiniteError, match=f"^{match}; the last good checkpoint is .*step_000002$"):
            trainer.fit()
    saved = read_state(tmp_path / "checkpoints/step_000002", "networks")
    assert_same({name: saved[name] for name in good}, good)
    with training(setup, tmp_path) as trainer:
        trainer.resume(tmp_path / "checkpoints/step_000002")
        assert_same(trainer_values(trainer), good)
        assert trainer.progress.step == 2
