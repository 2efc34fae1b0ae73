"""From a training configuration to a run: checks, models, stage, trainer, samples, exported weights.

Layer 4. What a user may have got wrong is checked before any GPU memory is taken, as far as that can tell.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longlive.build import (
    BUILTIN,
    builtin_modules,
    choose_device,
    choose_dtype,
    find_wan_folder,
    place_encoder,
    place_vae,
    read_vae_and_encoder,
)
from longlive.config import to_dict, to_yaml
from longlive.data.clips import LatentClips
from longlive.data.order import Order
from longlive.data.prompts import read_pairs, read_prompts
from longlive.distributed import local_world_size, world_size
from longlive.errors import InputError
from longlive.inference.video import check_writable
from longlive.models.attention import select_attention
from longlive.models.dit import PRESETS, WanDiT
from longlive.models.kv_cache import CacheConfig
from longlive.models.text_encoder import TextEncoder
from longlive.models.vae import WanVAE
from longlive.rollout import Sampler, SamplerConfig, SwitchPolicy
from longlive.train_config import DISTRIBUTION_MATCHING, TrainConfig, load_train_config
from longlive.training.checkpoint import Checkpoints, check_identity, find_latest
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
from longlive.training.export import CRITIC, GENERATOR, export
from longlive.training.flow_matching import CausalInit, FlowMatchingConfig, Pretrain
from longlive.training.metrics import Metrics, check_trackers
from longlive.training.networks import (
    Compute,
    LoraConfig,
    Weights,
    check_weights,
    make_frozen,
    make_rollout_copy,
    make_trained,
)
from longlive.training.parallel import Group, process_group
from longlive.training.sequence_parallel import SequenceParallel, share_frames
from longlive.training.stage import Stage
from longlive.training.trainer import EMAConfig, Network, OptimizerConfig, Trainer, TrainerConfig
from longlive.weights.files import atomic_file, write_json
from longlive.weights.formats import read_dit, read_generator
from longlive.weights.lora import Lora, check_rank, check_targets, read_lora

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """What a run begins with, read and checked, on the CPU. prompts: for every item its prompt, or a pair."""

    generator: Weights
    critic: Weights | None
    teacher: Weights | None
    lora: Lora | None
    critic_lora: Lora | None
    vae: WanVAE
    encoder: TextEncoder
    prompts: Sequence[tuple[str, ...]]
    clips: LatentClips | None


def run_training(config: TrainConfig) -> bool:
    """Train as a configuration says, from the newest checkpoint where there is one, and export the weights.

    Returns whether training is complete; it is not after a signal, which saves a checkpoint. Raises InputError for
    mistakes of the user, NonFiniteError for a run that broke.
    """
    check_processes(config)
    check_trackers(config.tensorboard, config.wandb_project)
    inputs = read_inputs(config)
    identity = run_identity(config, inputs)
    folder = Path(config.logdir)
    latest = find_latest(folder / "checkpoints")
    if latest is not None:
        check_identity(latest, identity)
    check_writable(folder)
    device = choose_device(config.device)
    shard_size = local_world_size() if config.sharding_strategy == "hybrid_full" else None
    with process_group(device, shard_size) as group:
        checkpoints = Checkpoints(folder / "checkpoints", config.max_checkpoints, identity)
        encode_prompts = place_encoder(inputs.encoder, device, config.low_memory)
        trainer = make_trainer(config, inputs, encode_prompts, group, checkpoints)
        if latest is not None:
            trainer.resume(latest)
            log.info("going on after step %d of %d, from %s", trainer.progress.step, config.max_iters, latest)
        if group.is_main:
            write_json(folder / "config.json", to_dict(config))
            trainer.metrics = Metrics(
                folder,
                tensorboard=config.tensorboard,
                wandb_project=config.wandb_project,
                config=to_dict(config),
                start_step=trainer.progress.step,
            )
        is_complete = trainer.fit()
        checkpoints.close()
        if group.is_main and is_complete:
            export_run(config, inputs.generator, inputs.critic)
        group.barrier()
    return is_complete


def check_processes(config: TrainConfig) -> None:
    """Raise InputError where the processes cannot share the work as the configuration says."""
    total = world_size()
    config.num_rounds(total)
    if config.sharding_strategy == "hybrid_full" and total % local_world_size():
        raise InputError(
            f"sharding_strategy=hybrid_full: {total} processes are not whole nodes of {local_world_size()}"
        )
    size = config.teacher_sequence_parallel
    if total % size:
        raise InputError(f"teacher_sequence_parallel={size}: does not divide the {total} processes")
    share_frames(config.clip_frames, size)


def run_identity(config: TrainConfig, inputs: Inputs) -> dict[str, Any]:
    """The settings that a run shares with the checkpoints it may go on from."""
    adapter = {key: getattr(config.adapter, key) for key in ("rank", "alpha", "apply_to_critic")}
    return {
        "stage": config.stage,
        "seed": config.seed,
        "generator": asdict(inputs.generator.config),
        "adapter": adapter if config.has_lora else None,
        "ema": config.ema_weight > 0,
        "frames": [config.clip_frames, config.num_frame_per_block],
        "height": config.height,
        "width": config.width,
        "model_kwargs": asdict(config.model_kwargs),
    }


def export_run(config: TrainConfig, generator: Weights, critic: Weights | None, checkpoint: Path | None = None) -> None:
    """Write the weights of a checkpoint, by default the newest, and a configuration that generates with them.

    generator, critic: what the run began with.
    """
    folder = Path(config.logdir)
    checkpoint = checkpoint or find_latest(folder / "checkpoints")
    if checkpoint is None:
        raise InputError(f"{folder}: holds no checkpoint yet")
    for path in export(checkpoint, folder, generator, critic, config.adapter.alpha):
        log.info("wrote %s", path)
    path = folder / "inference.yaml"
    with atomic_file(path) as file:
        file.write(to_yaml(inference_settings(config)).encode())
    log.info("see what it has learnt: bash inference.sh --config_path %s", path)


def inference_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings, other than defaults, that generate with the weights of a run as it was trained."""
    same = (
        *("model_name", "wan_folder", "height", "width", "fps", "num_frame_per_block", "warp_denoising_step"),
        *("context_noise", "global_sink"),
    )
    return {key: getattr(config, key) for key in same} | {
        "generator_ckpt": str(Path(config.logdir) / GENERATOR),
        "lora_ckpt": None,
        "denoising_step_list": list(config.denoising_step_list),
        "model_kwargs": asdict(config.model_kwargs),
        "output_folder": str(Path(config.logdir) / "videos"),
    }


# --- reading ----------------------------------------------------------------------------------------------------------


def read_inputs(config: TrainConfig) -> Inputs:
    """Read what a run needs. Raises InputError for what is missing, does not fit or cannot be read."""
    prompts, clips = read_data(config)
    generator = read_start(config)
    is_matching = config.stage in DISTRIBUTION_MATCHING
    critic = read_critic(config) if is_matching else None
    teacher = read_network(config, config.real_ckpt, config.real_name, "real_name") if is_matching else None
    lora = None
    critic_lora = None
    if config.lora_ckpt is not None:
        if not config.has_lora:
            raise InputError(f"lora_ckpt={config.lora_ckpt}: needs adapter.type=lora, which it would go on training")
        lora = read_lora(config.lora_ckpt)
        check_rank(lora, config.adapter.rank, config.lora_ckpt)
        check_targets(lora, generator.state, config.lora_ckpt)
    vae, encoder = read_vae_and_encoder(
        None if config.model_name == BUILTIN else existing_folder(config, config.model_name, "model_name"),
        generator.config.text_len,
        torch.float32,
    )
    if clips is not None:
        check_clips(config, clips, vae)
    return Inputs(generator, critic, teacher, lora, critic_lora, vae, encoder, prompts, clips)


def read_data(config: TrainConfig) -> tuple[list[tuple[str, ...]], LatentClips | None]:
    """Prompts, in pairs where they switch, or clips."""
    if config.stage not in DISTRIBUTION_MATCHING:
        assert config.clips_path is not None
        return [], LatentClips(config.clips_path)
    if config.stage == "streaming" and config.has_switch:
        config.switch_frames()
        return list(read_pairs(config.data_path, config.switch_prompt_path)), None
    return [(prompt,) for prompt in read_prompts(config.data_path)], None


def check_clips(config: TrainConfig, clips: LatentClips, vae: WanVAE) -> None:
    """Raise InputError unless the clips are of the size that is trained on."""
    wanted = (config.clip_frames, *latent_shape(config, vae))
    if clips.shape != wanted:
        raise InputError(
            f"{config.clips_path}: clips are {list(clips.shape)} latents (frames, channels, height, width), but "
            f"num_training_frames, height and width ask for {list(wanted)}"
        )


def read_start(config: TrainConfig) -> Weights:
    """The generator's weights to begin with: named, or exported by the stage before, or Wan's, or none yet."""
    if config.generator_ckpt is not None:
        return read_network(config, config.generator_ckpt, config.model_name, "model_name")
    if config.init_logdir is not None:
        exported = Path(config.init_logdir) / GENERATOR
        if not exported.exists():
            raise InputError(
                f"init_logdir: {exported} does not exist; train the stage before first, or name weights by "
                "generator_ckpt=FILE"
            )
        return read_network(config, str(exported), config.model_name, "model_name")
    return read_network(config, None, config.model_name, "model_name")


def read_critic(config: TrainConfig) -> Weights:
    """The critic's weights to begin with: named, or exported by the stage before, or those of the Wan model."""
    exported = Path(config.init_logdir or "") / CRITIC
    path = config.critic_ckpt or (str(exported) if config.init_logdir and exported.exists() else None)
    return read_network(config, path, config.fake_name or config.model_name, "fake_name")


def read_network(config: TrainConfig, path: str | None, name: str, key: str) -> Weights:
    """A transformer from the file `path`, or of the Wan model called `name`, which the configuration's `key` tells."""
    if path is None and name == BUILTIN:
        return Weights(PRESETS[BUILTIN], dict(builtin_modules()[0].state_dict()), "the built-in model")
    if path is not None:
        folder = find_wan_folder(config.wan_folder, name)
        source, (dit_config, state) = path, read_generator(path, folder)
    else:
        source = str(existing_folder(config, name, key))
        dit_config, state = read_dit(source)
    weights = Weights(dit_config, state, source)
    check_weights(weights)
    return weights


def existing_folder(config: TrainConfig, name: str, key: str) -> Path:
    folder = find_wan_folder(config.wan_folder, name)
    if not folder.exists():
        raise InputError(
            f"{key}: {folder} does not exist; bash scripts/download_weights.sh --teacher fetches the models"
        )
    return folder


# --- building ---------------------------------------------------------------------------------------------------------


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
    generator = make_trained(inputs.generator, lora_config(config, inputs.lora), group, compute)
    networks = {"generator": Network(generator, optimizer_config(config), ema_config(config))}
    stage: Stage
    if config.stage in DISTRIBUTION_MATCHING:
        assert inputs.critic is not None
        assert inputs.teacher is not None
        critic_lora = lora_config(config, inputs.critic_lora) if config.adapter.apply_to_critic else None
        critic = make_trained(inputs.critic, critic_lora, group, compute)
        networks["critic"] = Network(critic, critic_optimizer_config(config))
        players = Players(
            generator=generator,
            rollout=make_rollout_copy(inputs.generator.config, group, compute),
            critic=critic,
            teacher=make_teacher(config, inputs.teacher, group, compute),
            vae=inputs.vae,
            encode_prompts=encode_prompts,
            lora_scale=config.adapter.alpha / config.adapter.rank,
        )
        stage = make_matching(config, inputs, players, clock)
    else:
        stage = make_flow_matching(config, inputs, generator, encode_prompts, clock, compute)
    return Trainer(
        stage,
        networks,
        TrainerConfig(
            num_steps=config.max_iters,
            seed=config.seed,
            batch_size=config.batch_size,
            num_rounds=config.num_rounds(group.world_size),
            save_interval=config.log_iters,
            sample_interval=config.vis_interval,
        ),
        group,
        checkpoints,
        metrics=None,
        clock=clock,
    )


def make_teacher(config: TrainConfig, weights: Weights, group: Group, compute: Compute) -> Score:
    """The frozen teacher; over several processes its weights are shared out, and where asked for a clip's frames."""
    teacher = make_frozen(weights, group, compute, config.teacher_precision == "fp8")
    size = config.teacher_sequence_parallel
    if size == 1:
        return teacher
    return SequenceParallel(teacher, dist.new_subgroups(size)[0], compute.attention)


def make_matching(config: TrainConfig, inputs: Inputs, players: Players, clock: Clock) -> SelfForcing | Streaming:
    """The stage of the two published ones."""
    is_published = config.recache_policy == "published"
    policy: SwitchPolicy = "published_training" if is_published else "keep" if config.global_sink else "rewrite"
    sampling = SamplingConfig(
        latent_shape=latent_shape(config, inputs.vae),
        num_frames=config.clip_frames,
        cache=cache_config(config),
        policy=policy,
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
    clock: Clock,
    compute: Compute,
) -> Pretrain | CausalInit:
    """The stage of those that train on clips."""
    assert inputs.clips is not None
    common: dict[str, Any] = {
        "generator": generator,
        "clips": inputs.clips,
        "order": Order(len(inputs.clips), config.seed),
        "encode_prompts": encode_prompts,
        "negative_prompt": config.negative_prompt,
        "config": FlowMatchingConfig(config.model_kwargs.timestep_shift, config.prompt_dropout),
        "clock": clock,
    }
    if config.stage == "pretrain":
        return Pretrain(**common)
    sampler = Sampler(sampler_config(config))
    return CausalInit(**common, cache=cache_config(config), sampler=sampler, attention=compute.attention)


def latent_shape(config: TrainConfig, vae: WanVAE) -> tuple[int, int, int]:
    """Channels, height and width of a latent frame."""
    factor = vae.config.spatial_factor
    return vae.config.z_dim, config.height // factor, config.width // factor


def cache_config(config: TrainConfig) -> CacheConfig:
    kwargs = config.model_kwargs
    is_published = config.recache_policy == "published" and kwargs.sink_size > config.num_frame_per_block
    return CacheConfig(kwargs.local_attn_size, kwargs.sink_size, published_sink_fill=is_published)


def sampler_config(config: TrainConfig) -> SamplerConfig:
    return SamplerConfig(
        steps=tuple(config.denoising_step_list),
        warp=config.warp_denoising_step,
        shift=config.model_kwargs.timestep_shift,
        context_timestep=float(config.context_noise),
        frames_per_block=config.num_frame_per_block,
    )


def lora_config(config: TrainConfig, start: Lora | None) -> LoraConfig | None:
    if not config.has_lora:
        return None
    adapter = config.adapter
    return LoraConfig(adapter.rank, adapter.alpha, config.seed, start, config.lora_ckpt or "")


def optimizer_config(config: TrainConfig) -> OptimizerConfig:
    return OptimizerConfig(
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm_generator,
        warmup_steps=config.lr_warmup_steps,
        final_lr_ratio=config.lr_final_ratio,
    )


def critic_optimizer_config(config: TrainConfig) -> OptimizerConfig:
    return replace(
        optimizer_config(config),
        lr=config.lr_critic,
        betas=(config.beta1_critic, config.beta2_critic),
        max_grad_norm=config.max_grad_norm_critic,
    )


def ema_config(config: TrainConfig) -> EMAConfig:
    return EMAConfig(config.ema_weight, config.ema_start_step)


def export_folder(folder: Path, checkpoint: Path | None) -> None:
    """Write the weights of a checkpoint of the run in `folder`, by default the newest. Raises InputError."""
    config = load_train_config(folder / "config.json")
    config = replace(config, logdir=str(folder))
    export_run(
        config, read_start(config), read_critic(config) if config.stage in DISTRIBUTION_MATCHING else None, checkpoint
    )
