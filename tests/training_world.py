"""A tiny world to train in: every stage over real sharded networks, made in memory, and processes to train in."""

import multiprocessing
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import TINY_DIT, TINY_VAE, randomize, tiny_dit
from torch import Tensor

from longlive.data.clips import ClipBatch
from longlive.data.order import Order
from longlive.flow import FlowSchedule, add_noise, x0_to_flow
from longlive.models.attention import sdpa
from longlive.models.dit import Remat, WanDiT
from longlive.models.kv_cache import CacheConfig
from longlive.models.vae import WanVAE
from longlive.rollout import Sampler, SamplerConfig, SwitchPolicy
from longlive.training.checkpoint import Checkpoints
from longlive.training.clock import Clock
from longlive.training.distribution_matching import (
    Players,
    SamplingConfig,
    SelfForcing,
    Streaming,
    StreamingConfig,
)
from longlive.training.dmd import DMD, DMDConfig, Score
from longlive.training.draw import Draw, derived_seed
from longlive.training.flow_matching import CausalInit, FlowMatchingConfig, Pretrain
from longlive.training.metrics import Metrics, read_metrics
from longlive.training.networks import Compute, LoraConfig, Weights, make_rollout_copy, make_trained
from longlive.training.parallel import Group, process_group
from longlive.training.stage import Stage
from longlive.training.teacher_forcing import TeacherForced
from longlive.training.trainer import EMAConfig, Network, OptimizerConfig, Trainer, TrainerConfig

CPU = torch.device("cpu")
LATENT = (4, 4, 4)
PROMPTS = [(f"before {number}", f"after {number}") for number in range(5)]
LORA = LoraConfig(rank=4, alpha=8.0, seed=3)
TARGET = 0.5

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch.distributed.checkpoint", "torch.distributed.fsdp", "longlive.train"])


@dataclass
class Pull:
    """A teacher to whom every picture is TARGET everywhere; from its call number `breaks_at` on, NaN."""

    breaks_at: int | None = None
    num_calls: int = 0

    def __call__(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        self.num_calls += 1
        is_broken = self.breaks_at is not None and self.num_calls >= self.breaks_at
        target = torch.full_like(latents, torch.nan if is_broken else TARGET)
        schedule = FlowSchedule(DMDConfig().score_shift)
        return x0_to_flow(target, latents, schedule.sigma_at(timesteps)[..., None, None, None])


@dataclass(frozen=True)
class Setup:
    """A run. window, sink, block, clip, switches, max_frames, min_new_frames: in latent frames."""

    stage: str = "self_forcing"
    num_steps: int = 3
    batch_size: int = 1
    num_rounds: int = 1
    save_interval: int = 0
    has_lora: bool = False
    generator: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-3))
    critic: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-3))
    ema: EMAConfig = field(default_factory=EMAConfig)
    teacher: Score = field(default_factory=Pull)
    remat: Remat = "none"
    shard_size: int | None = None
    window: int = 4
    sink: int = 1
    relative: bool = False
    block: int = 2
    clip: int = 6
    policy: SwitchPolicy = "keep"
    critic_steps_per_generator_step: int = 2
    last_step_only: bool = False
    switches: tuple[int, ...] = (10,)
    max_frames: int = 16
    min_new_frames: int = 2
    has_trajectories: bool = False


def embed(texts: Sequence[str]) -> Tensor:
    """A prompt's embeddings are random numbers that follow from its text: [B, L, text_dim]."""
    generators = [torch.Generator().manual_seed(derived_seed(text)) for text in texts]
    return torch.stack([torch.randn(TINY_DIT.text_len, TINY_DIT.text_dim, generator=g) for g in generators])


def weights(seed: int) -> Weights:
    return Weights(TINY_DIT, dict(tiny_dit(seed=seed).state_dict()), "test")


def sampler_of(setup: Setup) -> Sampler:
    return Sampler(SamplerConfig(steps=(1000, 500), frames_per_block=setup.block))


def cache_of(setup: Setup) -> CacheConfig:
    return CacheConfig(setup.window, setup.sink, setup.relative)


class ToyClips:
    """A `LatentSource`: every clip is a value of its own everywhere, its ODE trajectories are straight."""

    def __init__(self, setup: Setup) -> None:
        self.num_frames = setup.clip
        self.sampler = sampler_of(setup) if setup.has_trajectories else None

    def __len__(self) -> int:
        return len(PROMPTS)

    def batch(self, items: Sequence[int]) -> ClipBatch:
        x0 = torch.stack([torch.full((self.num_frames, *LATENT), 0.4 + 0.2 * item) for item in items])
        noise = torch.stack([self._noise(item) for item in items])
        states = [add_noise(x0, noise, sigma) for sigma in self.sampler.sigmas] if self.sampler is not None else []
        return ClipBatch([PROMPTS[item][0] for item in items], x0, torch.stack(states, dim=1) if states else None)

    def _noise(self, item: int) -> Tensor:
        return torch.randn(self.num_frames, *LATENT, generator=torch.Generator().manual_seed(item))


def make_trainer(setup: Setup, group: Group, folder: Path, keep_last: int = 5) -> Trainer:
    """A trainer for `setup` whose checkpoints are in a folder; it keeps no log."""
    compute, clock = Compute(torch.float32, sdpa, setup.remat), Clock(group.device)
    lora = LORA if setup.has_lora else None
    networks = {"generator": Network(make_trained(weights(0), lora, group, compute), setup.generator, setup.ema)}
    stage: Stage
    if setup.stage in ("self_forcing", "streaming"):
        networks["critic"] = Network(make_trained(weights(1), lora, group, compute), setup.critic)
        stage = make_matching(setup, networks, group, compute, clock)
    else:
        stage = make_flow_matching(setup, networks["generator"], clock)
    config = TrainerConfig(
        num_steps=setup.num_steps,
        seed=7,
        batch_size=setup.batch_size,
        num_rounds=setup.num_rounds,
        save_interval=setup.save_interval,
    )
    checkpoints = Checkpoints(folder / "checkpoints", keep_last, {"stage": setup.stage})
    return Trainer(stage, networks, config, group, checkpoints, None, clock)


def make_matching(
    setup: Setup, networks: dict[str, Network], group: Group, compute: Compute, clock: Clock
) -> SelfForcing | Streaming:
    vae = WanVAE(TINY_VAE).eval().requires_grad_(False)
    randomize(vae, std=0.25)
    rollout = make_rollout_copy(TINY_DIT, group, compute)
    players = Players(
        generator=networks["generator"].module,  # type: ignore[arg-type]
        rollout=rollout,
        passes=rollout,
        trained=networks["generator"].module,  # type: ignore[arg-type]
        critic=networks["critic"].module,  # type: ignore[arg-type]
        teacher=setup.teacher,
        vae=vae,
        encode_prompts=embed,
        lora_scale=LORA.scale,
    )
    sampling = SamplingConfig(
        latent_shape=LATENT,
        num_frames=setup.clip,
        cache=cache_of(setup),
        policy=setup.policy,
        critic_steps_per_generator_step=setup.critic_steps_per_generator_step,
        last_step_only=setup.last_step_only,
    )
    common: dict[str, Any] = {
        "players": players,
        "dmd": DMD(DMDConfig()),
        "sampler": sampler_of(setup),
        "config": sampling,
        "prompts": PROMPTS,
        "order": Order(len(PROMPTS), seed=7),
        "negative_prompt": "",
        "clock": clock,
    }
    if setup.stage == "self_forcing":
        return SelfForcing(**common)
    streaming = StreamingConfig(setup.max_frames, setup.min_new_frames, switch_frames=setup.switches)
    return Streaming(**common, streaming=streaming)


def make_flow_matching(setup: Setup, generator: Network, clock: Clock) -> Pretrain | CausalInit:
    model = generator.module
    if setup.stage == "causal_init":
        assert isinstance(model, WanDiT)
        model = TeacherForced(model, cache_of(setup), setup.block, 0.0, sdpa)
    common: dict[str, Any] = {
        "generator": model,
        "clips": ToyClips(setup),
        "order": Order(len(PROMPTS), seed=7),
        "encode_prompts": embed,
        "negative_prompt": "",
        "config": FlowMatchingConfig(),
        "clock": clock,
    }
    if setup.stage == "pretrain":
        return Pretrain(**common)
    return CausalInit(**common, sampler=sampler_of(setup))


@contextmanager
def training(setup: Setup, folder: Path) -> Iterator[Trainer]:
    """A trainer in this process, which is the only one."""
    with process_group(CPU, setup.shard_size) as group:
        yield make_trainer(setup, group, folder)


def draw_at(position: int, batch_size: int = 1) -> Draw:
    """The numbers of one process at a place in training."""
    return Draw(seed=11, position=position, num_samples=batch_size, offset=0, batch_size=batch_size, device=CPU)


# --- processes --------------------------------------------------------------------------------------------------------


def train(setup: Setup, folder: Path, disturb: Callable[[Trainer], None] | None = None) -> None:
    """What a process does: train from the newest checkpoint to the end. disturb: prepares for what will stop it."""
    with process_group(CPU, setup.shard_size) as group:
        trainer = make_trainer(setup, group, folder)
        latest = trainer.checkpoints.latest()
        if latest is not None:
            trainer.resume(latest)
        if group.is_main:
            start = trainer.progress.step
            trainer.metrics = Metrics(folder, tensorboard=False, wandb_project=None, config={}, start_step=start)
        if disturb is not None:
            disturb(trainer)
        assert trainer.fit() == (disturb is None)
        trainer.checkpoints.wait()


def enter(job: Callable[..., None], rank: int, world_size: int, port: int, arguments: tuple[Any, ...]) -> None:
    """In the child: torchrun's variables, of which a single process has none."""
    torch.set_num_threads(1)
    random.seed(rank)
    torch.manual_seed(rank)  # nothing may depend on it
    if world_size > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    job(*arguments)


def launch(job: Callable[..., None], world_size: int, *arguments: Any) -> list[int | None]:
    """Run a job in new processes, which meet at a store of this one, as with torchrun; returns their exit codes."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes: list[BaseProcess] = [
        PROCESSES.Process(target=enter, args=(job, rank, world_size, store.port, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def losses(folder: Path) -> list[dict[str, Any]]:
    """All that a run has logged, but for what time and memory it took."""
    timed = ("time", "throughput/", "memory/")
    return [{k: v for k, v in record.items() if not k.startswith(timed)} for record in read_metrics(folder)]
