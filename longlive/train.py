"""From a training configuration to a run: checks, models, stage, trainer, samples, exported weights.

Layer 4. What a user may have got wrong is checked before any GPU memory is taken, as far as that can tell.
"""

import logging
import os
import re
from collections.abc import Callable, Sequence
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
    load_encoder,
    load_vae,
    place_encoder,
    place_vae,
)
from longlive.config import to_dict, to_yaml
from longlive.data.clips import LatentClips, PixelClips
from longlive.data.order import Order
from longlive.data.prompts import read_pairs, read_prompts
from longlive.distributed import local_world_size, world_size
from longlive.errors import InputError
from longlive.inference.session import Models, SessionConfig
from longlive.inference.video import check_writable
from longlive.models.attention import select_attention
from longlive.models.dit import PRESETS, DiTConfig, WanDiT, init_weights
from longlive.models.kv_cache import CacheConfig
from longlive.models.text_encoder import TextEncoder
from longlive.models.vae import VAEConfig, WanVAE
from longlive.rollout import Sampler, SamplerConfig, SwitchPolicy
from longlive.train_config import CAUSAL, DISTRIBUTION_MATCHING, TrainConfig, load_train_config
from longlive.train_samples import SampleVideos
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
from longlive.training.draw import derived_seed
from longlive.training.export import CRITIC, GENERATOR, export, export_vae
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
from longlive.training.parallel import Group, process_group, shard
from longlive.training.sequence_parallel import SequenceParallel, share_frames
from longlive.training.stage import Stage
from longlive.training.trainer import EMAConfig, Network, OptimizerConfig, Trainer, TrainerConfig
from longlive.training.vae_stage import Autoencoder, VAELossConfig, VAETraining
from longlive.weights.files import StateDict, atomic_file, shorten, write_json
from longlive.weights.formats import read_dit, read_generator
from longlive.weights.lora import Lora, check_rank, check_targets, read_lora

log = logging.getLogger(__name__)


VAE_FILE = "vae.safetensors"
NUM_STATISTICS_CLIPS = 256


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


@dataclass(frozen=True)
class Job:
    """What a stage trains, read and checked. identity: the settings that its checkpoints share; make_trainer: puts the
    models on the device; export: writes the weights of a checkpoint into the run's folder and returns the files."""

    identity: dict[str, Any]
    make_trainer: Callable[[Group, Checkpoints], Trainer]
    export: Callable[[Path], list[Path]]


def run_training(config: TrainConfig) -> bool:
    """Train as a configuration says, from the newest checkpoint where there is one, and export the weights.

    Returns whether training is complete; it is not after a signal, which saves a checkpoint. Raises InputError for
    mistakes of the user, NonFiniteError for a run that broke.
    """
    check_processes(config)
    check_trackers(config.tensorboard, config.wandb_project)
    job = read_job(config)
    folder = Path(config.logdir)
    latest = find_latest(folder / "checkpoints")
    if latest is not None:
        check_identity(latest, job.identity)
    check_writable(folder)
    device = choose_device(config.device)
    shard_size = local_world_size() if config.sharding_strategy == "hybrid_full" else None
    with process_group(device, shard_size) as group:
        checkpoints = Checkpoints(folder / "checkpoints", config.max_checkpoints, job.identity)
        trainer = job.make_trainer(group, checkpoints)
        if latest is not None:
            trainer.resume(latest)
            log.info("going on after step %d of %d, from %s", trainer.progress.step, config.max_iters, latest)
        if group.is_main:
            trainer.metrics = open_metrics(config, trainer.progress.step)
        is_complete = trainer.fit()
        latest = checkpoints.latest()
        checkpoints.close()
        if group.is_main and is_complete and latest is not None:
            export_checkpoint(config, job, latest)
        group.barrier()
    return is_complete


def export_folder(folder: Path, checkpoint: Path | None) -> None:
    """Write the weights of a checkpoint of the run in `folder`, by default the newest. Raises InputError."""
    config = replace(load_train_config(folder / "config.json"), logdir=str(folder.absolute()))
    checkpoint = checkpoint or find_latest(folder / "checkpoints")
    if checkpoint is None:
        raise InputError(f"{folder}: holds no checkpoint yet")
    export_checkpoint(config, read_job(config), checkpoint)


def read_job(config: TrainConfig) -> Job:
    """Read and check what a stage needs. Raises InputError."""
    return vae_job(config) if config.stage == "vae" else generator_job(config)


def open_metrics(config: TrainConfig, start_step: int) -> Metrics:
    """The run's log, and its configuration beside it."""
    folder = Path(config.logdir)
    write_json(folder / "config.json", to_dict(config))
    return Metrics(
        folder,
        tensorboard=config.tensorboard,
        wandb_project=config.wandb_project,
        config=to_dict(config),
        start_step=start_step,
    )


def export_checkpoint(config: TrainConfig, job: Job, checkpoint: Path) -> None:
    """Write the weights of a checkpoint and, of a causal model, a configuration that generates with them."""
    for path in job.export(checkpoint):
        log.info("wrote %s", path)
    if config.stage in CAUSAL:
        path = Path(config.logdir) / "inference.yaml"
        with atomic_file(path) as file:
            file.write(to_yaml(inference_settings(config)).encode())
        log.info("see what it has learnt: bash inference.sh --config_path %s", path)


def check_processes(config: TrainConfig) -> None:
    """Raise InputError where the processes cannot share the work as the configuration says."""
    total = world_size()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if total > 1 and missing:
        raise InputError(
            f"WORLD_SIZE={total}, but {shorten(missing)} not set; torchrun and NUM_GPUS=N bash train_init.sh set all"
        )
    config.num_rounds(total)
    if config.sharding_strategy == "hybrid_full" and total % local_world_size():
        raise InputError(
            f"sharding_strategy=hybrid_full: {total} processes are not whole nodes of {local_world_size()}"
        )
    size = config.teacher_sequence_parallel
    if total % size:
        raise InputError(f"teacher_sequence_parallel={size}: does not divide the {total} processes")
    share_frames(config.clip_frames, size)


def inference_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings, other than defaults, that generate with the weights of a run as it was trained."""
    same = (
        *("model_name", "wan_folder", "vae_ckpt", "height", "width", "fps", "num_frame_per_block"),
        *("warp_denoising_step", "context_noise", "global_sink"),
    )
    return {key: getattr(config, key) for key in same} | {
        "generator_ckpt": str(Path(config.logdir) / GENERATOR),
        "lora_ckpt": None,
        "denoising_step_list": list(config.denoising_step_list),
        "model_kwargs": asdict(config.model_kwargs),
        "output_folder": str(Path(config.logdir) / "videos"),
    }


def generator_job(config: TrainConfig) -> Job:
    """All stages but that of the VAE."""
    inputs = read_inputs(config)

    def make(group: Group, checkpoints: Checkpoints) -> Trainer:
        encode_prompts = place_encoder(inputs.encoder, group.device, config.low_memory)
        return make_trainer(config, inputs, encode_prompts, group, checkpoints)

    def write(checkpoint: Path) -> list[Path]:
        return export(checkpoint, Path(config.logdir), inputs.generator, inputs.critic, config.adapter.alpha)

    return Job(run_identity(config, inputs), make, write)


def run_identity(config: TrainConfig, inputs: Inputs) -> dict[str, Any]:
    """The settings that a run shares with the checkpoints it may go on from."""
    keys = ("type", "rank", "alpha", "apply_to_critic") if config.has_lora else ("type",)
    return {
        "stage": config.stage,
        "seed": config.seed,
        "generator": asdict(inputs.generator.config),
        "adapter": {key: getattr(config.adapter, key) for key in keys},
        "ema": config.ema_weight > 0,
        "frames": [config.clip_frames, config.num_frame_per_block],
        "height": config.height,
        "width": config.width,
        "model_kwargs": asdict(config.model_kwargs),
    }


def vae_job(config: TrainConfig) -> Job:
    """The stage of the VAE."""
    assert config.clips_path is not None
    vae_config = VAEConfig(base_dim=config.vae_base_dim, z_dim=config.vae_z_dim)
    num_video_frames = 1 + vae_config.temporal_factor * (config.num_training_frames - 1)
    clips = PixelClips(config.clips_path, config.height, config.width, num_video_frames, config.fps)
    order = Order(len(clips), config.seed)

    def make(group: Group, checkpoints: Checkpoints) -> Trainer:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(config.seed, "weights"))
            autoencoder = Autoencoder(WanVAE(vae_config)).to(group.device)
        shard(autoencoder, group, None if group.device.type == "cpu" else torch.bfloat16)
        loss = VAELossConfig(config.kl_weight, config.foreground_weight)
        clock = Clock(group.device)
        stage = VAETraining(autoencoder, vae_config, clips, order, loss, clock)
        networks = {"vae": Network(autoencoder, optimizer_config(config), ema_config(config))}
        return Trainer(stage, networks, trainer_config(config, group), group, checkpoints, None, clock)

    def write(checkpoint: Path) -> list[Path]:
        path = Path(config.logdir) / VAE_FILE
        items = [[order[i]] for i in range(min(len(clips), NUM_STATISTICS_CLIPS))]
        export_vae(checkpoint, path, vae_config, map(clips.pixels, items))
        return [path]

    sizes = {"vae": asdict(vae_config), "frames": config.num_training_frames}
    size = {"height": config.height, "width": config.width}
    return Job({"stage": config.stage, "seed": config.seed, "ema": config.ema_weight > 0, **sizes, **size}, make, write)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_inputs(config: TrainConfig) -> Inputs:
    """Read what a run needs. Raises InputError for what is missing, does not fit or cannot be read."""
    prompts, clips = read_data(config)
    start = None if config.preset else read_start(config)
    folder = None
    if config.model_name != BUILTIN:
        folder = existing_folder(config.wan_folder, config.model_name, "model_name")
    vae = load_vae(folder, torch.float32, config.vae_ckpt)
    encoder = load_encoder(folder, DiTConfig().text_len if start is None else start.config.text_len)
    generator = start or random_weights(config, vae, encoder)
    is_matching = config.stage in DISTRIBUTION_MATCHING
    critic = read_critic(config) if is_matching else None
    teacher = read_network(config.wan_folder, config.real_ckpt, config.real_name, "real_name") if is_matching else None
    for network in (generator, critic, teacher):
        if network is not None:
            check_interface(network, vae, encoder)
    lora = None
    critic_lora = None
    if config.lora_ckpt is not None:
        if not config.has_lora:
            raise InputError(f"lora_ckpt={config.lora_ckpt}: needs adapter.type=lora, which it would go on training")
        lora = read_lora(config.lora_ckpt)
        check_rank(lora, config.adapter.rank, config.lora_ckpt)
        check_targets(lora, generator.state, config.lora_ckpt)
        check_complete(lora, generator.state, config.lora_ckpt)
    if clips is not None:
        check_clips(config, clips, vae)
    return Inputs(generator, critic, teacher, lora, critic_lora, vae, encoder, prompts, clips)


def check_interface(network: Weights, vae: WanVAE, encoder: TextEncoder) -> None:
    """Raise InputError unless a transformer works on the latents of the VAE and the prompts of the text encoder."""
    wanted = {"in_channels": vae.config.z_dim, "out_channels": vae.config.z_dim, "text_dim": encoder.config.dim}
    found = {name: getattr(network.config, name) for name in wanted}
    wrong = [f"{name} is {found[name]}, not {size}" for name, size in wanted.items() if found[name] != size]
    if wrong:
        raise InputError(f"{network.source}: does not fit VAE and text encoder: {', '.join(wrong)}")


def check_complete(lora: Lora, state: StateDict, source: str) -> None:
    """Raise InputError unless a LoRA has a pair for every linear layer of the blocks, all of which are trained."""
    linear = [name for name, weight in state.items() if re.fullmatch(r"blocks\..+\.weight", name) and weight.ndim == 2]
    missing = [module for name in linear if (module := name.removesuffix(".weight")) not in lora]
    if missing:
        raise InputError(f"{source}: LoRA of another model: has none for {shorten(missing)}")


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
        return read_network(config.wan_folder, config.generator_ckpt, config.model_name, "model_name")
    if config.init_logdir is not None:
        exported = Path(config.init_logdir) / GENERATOR
        if not exported.exists():
            raise InputError(
                f"init_logdir: {exported} does not exist; train the stage before first, or name weights by "
                "generator_ckpt=FILE"
            )
        return read_network(config.wan_folder, str(exported), config.model_name, "model_name")
    return read_network(config.wan_folder, None, config.model_name, "model_name")


def random_weights(config: TrainConfig, vae: WanVAE, encoder: TextEncoder) -> Weights:
    """Fresh weights of the sizes that `preset` names, for the latents and prompts of VAE and text encoder."""
    assert config.preset is not None
    channels, text = vae.config.z_dim, encoder.config
    dit_config = replace(
        PRESETS[config.preset],
        in_channels=channels,
        out_channels=channels,
        text_dim=text.dim,
        text_len=text.text_len,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(config.seed, "weights"))
        model = WanDiT(dit_config)
        init_weights(model)
    return Weights(dit_config, dict(model.state_dict()), f"preset={config.preset}")


def read_critic(config: TrainConfig) -> Weights:
    """The critic's weights to begin with: named, or exported by the stage before, or those of the Wan model."""
    exported = Path(config.init_logdir or "") / CRITIC
    path = config.critic_ckpt or (str(exported) if config.init_logdir and exported.exists() else None)
    return read_network(config.wan_folder, path, config.fake_name or config.model_name, "fake_name")


def read_network(wan_folder: str, path: str | None, name: str, key: str) -> Weights:
    """A transformer from the file `path`, or of the Wan model called `name`, which the configuration's `key` tells."""
    if path is None and name == BUILTIN:
        return Weights(PRESETS[BUILTIN], dict(builtin_modules()[0].state_dict()), "the built-in model")
    if path is not None:
        folder = find_wan_folder(wan_folder, name)
        source, (dit_config, state) = path, read_generator(path, folder)
    else:
        source = str(existing_folder(wan_folder, name, key))
        dit_config, state = read_dit(source)
    weights = Weights(dit_config, state, source)
    check_weights(weights)
    return weights


def existing_folder(wan_folder: str, name: str, key: str) -> Path:
    folder = find_wan_folder(wan_folder, name)
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
    lora_scale = config.adapter.alpha / config.adapter.rank
    rollout = make_rollout_copy(inputs.generator.config, group, compute) if needs_copy(config) else None
    stage: Stage
    if config.stage in DISTRIBUTION_MATCHING:
        assert inputs.critic is not None
        assert inputs.teacher is not None
        assert rollout is not None
        critic_lora = lora_config(config, inputs.critic_lora) if config.adapter.apply_to_critic else None
        critic = make_trained(inputs.critic, critic_lora, group, compute)
        networks["critic"] = Network(critic, critic_optimizer_config(config))
        players = Players(
            generator=generator,
            rollout=rollout,
            critic=critic,
            teacher=make_teacher(config, inputs.teacher, group, compute),
            vae=inputs.vae,
            encode_prompts=encode_prompts,
            lora_scale=lora_scale,
        )
        stage = make_matching(config, inputs, players, clock)
    else:
        stage = make_flow_matching(config, inputs, generator, encode_prompts, clock, compute)
    sample = None
    if rollout is not None and config.vis_interval:
        models = Models(rollout, inputs.vae, encode_prompts)
        session = SessionConfig(
            config.height, config.width, sampler_config(config), cache_config(config), switch_policy(config)
        )
        prompts = inputs.prompts or [(prompt,) for prompt in read_prompts(config.data_path)]
        sample = SampleVideos(config, session, models, networks["generator"], lora_scale, prompts, group)
    return Trainer(
        stage, networks, trainer_config(config, group), group, checkpoints, metrics=None, clock=clock, sample=sample
    )


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
        betas=(config.beta1_critic, config.beta2_critic),
        max_grad_norm=config.max_grad_norm_critic,
    )


def ema_config(config: TrainConfig) -> EMAConfig:
    return EMAConfig(config.ema_weight, config.ema_start_step)
