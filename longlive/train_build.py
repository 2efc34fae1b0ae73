"""From a training configuration and its inputs to models on the device, stage and trainer. Layer 4."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from longlive.build import (
    choose_dtype,
    place_vae,
)
from longlive.data.clips import LatentSource
from longlive.data.order import Order
from longlive.graphs import GraphedModule, GraphedPasses
from longlive.inference.session import Models, SessionConfig
from longlive.models.attention import select_attention
from longlive.models.dit import WanDiT
from longlive.models.kv_cache import CacheConfig
from longlive.models.vae import RMSNorm
from longlive.rollout import Sampler, SamplerConfig, SwitchPolicy
from longlive.train_config import CAUSAL, DISTRIBUTION_MATCHING, TrainConfig
from longlive.train_inputs import Inputs, latent_shape
from longlive.train_samples import SampleVideos
from longlive.train_world import encode_world
from longlive.training.checkpoint import Checkpoints
from longlive.training.clip_pass import ClipPass
from longlive.training.clock import Clock
from longlive.training.distribution_matching import (
    EncodePrompts,
    Players,
    SamplingConfig,
    SelfForcing,
    Streaming,
    StreamingConfig,
)
from longlive.training.dmd import DMD, DMDConfig, Score
from longlive.training.draw import Pictures
from longlive.training.flow_matching import CausalInit, FlowMatchingConfig, Pretrain
from longlive.training.networks import (
    Compute,
    LoraConfig,
    Weights,
    make_frozen,
    make_rollout_copy,
    make_trained,
)
from longlive.training.parallel import Group
from longlive.training.sequence_parallel import SequenceParallel
from longlive.training.stage import Stage
from longlive.training.teacher_forcing import TeacherForced
from longlive.training.trainer import EMAConfig, Network, OptimizerConfig, Trainer, TrainerConfig
from longlive.weights.lora import Lora


def make_trainer(
    config: TrainConfig, inputs: Inputs, encode_prompts: EncodePrompts, group: Group, checkpoints: Checkpoints
) -> Trainer:
    """Models on the device, the stage, and the trainer over both."""
    clock = Clock(group.device)
    dtype = choose_dtype("auto", group.device)
    compute = Compute(
        dtype,
        select_attention(config.attention, group.device, dtype),
        config.activation_checkpointing,  # type: ignore[arg-type]
        config.compile,
    )
    place_vae(inputs.vae, group.device, dtype)
    if config.compile and config.world is not None:
        compile_norms(inputs.vae)
    generator = make_trained(inputs.generator, lora_config(config, inputs.lora), group, compute)
    networks = {"generator": Network(generator, optimizer_config(config), ema_config(config), dtype)}
    rollout = make_rollout_copy(inputs.generator.config, group, compute) if needs_copy(config) else None
    stage: Stage
    if config.stage in DISTRIBUTION_MATCHING:
        assert rollout is not None
        players, critic = make_players(config, inputs, generator, rollout, encode_prompts, group, compute)
        networks["critic"] = Network(critic, critic_optimizer_config(config), compute_dtype=dtype)
        stage = make_matching(config, inputs, players, clock)
    else:
        stage = make_flow_matching(config, inputs, generator, encode_prompts, group, compute, clock)
    sample = None
    if rollout is not None and config.vis_interval:
        models = Models(rollout, inputs.vae, encode_prompts)
        session = SessionConfig(
            config.height, config.width, sampler_config(config), cache_config(config), switch_policy(config)
        )
        prompts = inputs.prompts if config.stage == "streaming" else [texts[:1] for texts in inputs.prompts]
        sample = SampleVideos(config, session, models, networks["generator"], lora_scale(config), prompts, group)
    return Trainer(
        stage, networks, trainer_config(config, group), group, checkpoints, metrics=None, clock=clock, sample=sample
    )


def make_players(
    config: TrainConfig,
    inputs: Inputs,
    generator: WanDiT,
    rollout: WanDiT,
    encode_prompts: EncodePrompts,
    group: Group,
    compute: Compute,
) -> tuple[Players, WanDiT]:
    """The networks of distribution matching as the stage calls them, and the critic as it is trained."""
    assert inputs.critic is not None
    assert inputs.teacher is not None
    critic_lora = lora_config(config, inputs.critic_lora) if config.adapter.apply_to_critic else None
    critic = make_trained(inputs.critic, critic_lora, group, compute)
    teacher = make_teacher(config, inputs.teacher, group, compute)
    trained: WanDiT | ClipPass = generator
    if config.one_gradient_pass:
        in_graphs = partial(graphed, config=config, group=group)
        trained = ClipPass(generator, config.num_frame_per_block, compute.attention, in_graphs)
    players = Players(
        generator=generator,
        rollout=rollout,
        trained=trained,
        passes=GraphedPasses(rollout) if has_graphs(config, group) else rollout,
        critic=graphed(critic, config, group),
        teacher=graphed(teacher, config, group) if isinstance(teacher, WanDiT) else teacher,
        vae=inputs.vae,
        encode_prompts=encode_prompts,
        lora_scale=lora_scale(config),
    )
    return players, critic


def compile_norms(vae: nn.Module) -> None:
    """Compile the norms of a VAE, whose kernels suit few channels badly. (All of it would take a minute.)"""
    torch._dynamo.config.recompile_limit = 64  # of every width, pictures and videos
    for module in vae.modules():
        if isinstance(module, RMSNorm):
            module.compile(dynamic=True)


def has_graphs(config: TrainConfig, group: Group) -> bool:
    """Whether passes are replayed as CUDA graphs."""
    return config.cuda_graphs and group.device.type == "cuda" and group.world_size == 1


def graphed(module: nn.Module, config: TrainConfig, group: Group) -> Callable[..., Any]:
    """A module, or its calls replayed."""
    return GraphedModule(module) if has_graphs(config, group) else module


def needs_copy(config: TrainConfig) -> bool:
    """Whether something rolls out: the stage, or sample videos."""
    return config.stage in DISTRIBUTION_MATCHING or (config.stage in CAUSAL and config.vis_interval > 0)


def make_teacher(config: TrainConfig, weights: Weights, group: Group, compute: Compute) -> Score:
    """The frozen teacher; over several processes its weights are shared out, and where asked for a clip's frames."""
    teacher = make_frozen(weights, group, compute, config.teacher_precision == "fp8")
    size = config.teacher_sequence_parallel
    if size == 1:
        return teacher
    return SequenceParallel(teacher, dist.new_subgroups(size)[0], compute.attention)


def make_matching(config: TrainConfig, inputs: Inputs, players: Players, clock: Clock) -> SelfForcing | Streaming:
    """The stage of the two published ones."""
    sampling = SamplingConfig(
        latent_shape=latent_shape(config, inputs.vae),
        num_frames=config.clip_frames,
        cache=cache_config(config),
        policy="published_training" if config.recache_policy == "published" else switch_policy(config),
        critic_steps_per_generator_step=config.dfake_gen_update_ratio,
        last_step_only=config.last_step_only,
        same_step_across_blocks=config.same_step_across_blocks,
    )
    dmd_config = DMDConfig(
        guidance=config.guidance_scale,
        fake_guidance=config.fake_guidance_scale,
        shift=config.model_kwargs.timestep_shift,
        score_shift=config.score_timestep_shift,
        min_timestep=config.min_score_timestep,
        max_timestep=config.max_score_timestep,
    )
    common: dict[str, Any] = {
        "players": players,
        "dmd": DMD(dmd_config, clock.device),
        "sampler": Sampler(sampler_config(config)),
        "config": sampling,
        "prompts": inputs.prompts,
        "order": Order(len(inputs.prompts), config.seed),
        "negative_prompt": config.negative_prompt,
        "clock": clock,
    }
    if config.stage == "self_forcing":
        return SelfForcing(**common)
    streaming = StreamingConfig(
        max_frames=config.streaming_max_length,
        min_new_frames=config.streaming_min_new_frame,
        train_first_chunk=config.train_first_chunk,
        switch_frames=config.switch_frames() if config.has_switch else (),
    )
    return Streaming(**common, streaming=streaming)


def make_flow_matching(
    config: TrainConfig,
    inputs: Inputs,
    generator: WanDiT,
    encode_prompts: EncodePrompts,
    group: Group,
    compute: Compute,
    clock: Clock,
) -> Pretrain | CausalInit:
    """The stage of those that train on clips."""
    model: nn.Module = generator
    if config.stage == "causal_init":
        sampling = config.num_frame_per_block, float(config.context_noise)
        model = TeacherForced(generator, cache_config(config), *sampling, compute.attention)
    clips: LatentSource = inputs.clips or encode_world(config, inputs, clock.device)
    common: dict[str, Any] = {
        "generator": graphed(model, config, group),
        "clips": clips,
        "order": Order(len(clips), config.seed),
        "encode_prompts": encode_prompts,
        "negative_prompt": config.negative_prompt,
        "config": FlowMatchingConfig(
            shift=config.model_kwargs.timestep_shift,
            prompt_dropout=config.prompt_dropout,
            hint_share=config.hint_share,
            pictures=Pictures(config.picture_share, config.clip_frames),
        ),
        "clock": clock,
    }
    if config.stage == "pretrain":
        return Pretrain(**common)
    return CausalInit(**common, sampler=Sampler(sampler_config(config)))


def cache_config(config: TrainConfig) -> CacheConfig:
    kwargs = config.model_kwargs
    is_published = config.recache_policy == "published" and kwargs.sink_size > config.num_frame_per_block
    return CacheConfig(kwargs.local_attn_size, kwargs.sink_size, kwargs.use_infinite_attention, is_published)


def switch_policy(config: TrainConfig) -> SwitchPolicy:
    """That of inference."""
    return "keep" if config.global_sink else "rewrite"


def sampler_config(config: TrainConfig) -> SamplerConfig:
    return SamplerConfig(
        steps=tuple(config.denoising_step_list),
        warp=config.warp_denoising_step,
        shift=config.model_kwargs.timestep_shift,
        context_timestep=float(config.context_noise),
        frames_per_block=config.num_frame_per_block,
    )


def lora_scale(config: TrainConfig) -> float:
    return config.adapter.alpha / config.adapter.rank


def lora_config(config: TrainConfig, start: Lora | None) -> LoraConfig | None:
    if not config.has_lora:
        return None
    adapter = config.adapter
    return LoraConfig(adapter.rank, adapter.alpha, config.seed, start, config.lora_ckpt or "")


def optimizer_config(config: TrainConfig) -> OptimizerConfig:
    return OptimizerConfig(
        lr=config.lr,
        muon_lr=config.muon_lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm_generator,
        warmup_steps=config.lr_warmup_steps,
        final_lr_ratio=config.lr_final_ratio,
    )


def trainer_config(config: TrainConfig, group: Group) -> TrainerConfig:
    return TrainerConfig(
        num_steps=config.max_iters,
        seed=config.seed,
        batch_size=config.batch_size,
        num_rounds=config.num_rounds(group.world_size),
        save_interval=config.log_iters,
        sample_interval=config.vis_interval,
    )


def critic_optimizer_config(config: TrainConfig) -> OptimizerConfig:
    return replace(
        optimizer_config(config),
        lr=config.lr_critic,
        muon_lr=0.0,
        betas=(config.beta1_critic, config.beta2_critic),
        max_grad_norm=config.max_grad_norm_critic,
    )


def ema_config(config: TrainConfig) -> EMAConfig:
    return EMAConfig(config.ema_weight, config.ema_start_step)
