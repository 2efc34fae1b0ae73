"""From a configuration to loaded models and a run: the one place where the parts meet.

Layer 4. What a user may have got wrong is checked before the first weight is read, as far as that can tell.
"""

import logging
import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import longlive
from longlive.builtin import (
    BUILTIN,
    BUILTIN_GENERATOR,
    BUILTIN_HEIGHT_PX,
    BUILTIN_MODEL_KWARGS,
    BUILTIN_STEPS,
    BUILTIN_VAE,
    BUILTIN_WIDTH_PX,
    builtin_encoder,
)
from longlive.config import ROOT, InferenceConfig, to_dict
from longlive.data.prompts import Script, make_script, read_scripts
from longlive.data.shapes.captions import parse
from longlive.distributed import is_main, local_rank, rank, shard, world_size
from longlive.errors import InputError
from longlive.inference.pipeline import OutputConfig, load_clip, make_videos, missing_jobs, plan_jobs
from longlive.inference.session import Models, SessionConfig
from longlive.inference.video import check_writable
from longlive.models.attention import select_attention
from longlive.models.dit import WanDiT
from longlive.models.kv_cache import CacheConfig
from longlive.models.text_encoder import PromptCache, TextEncoder, load_tokenizer, offload
from longlive.models.vae import WanVAE
from longlive.rollout import SamplerConfig
from longlive.weights.files import check_finite, fingerprint, load_into
from longlive.weights.formats import (
    DIT,
    PARTS,
    VAE,
    Part,
    find_weights,
    load_text_encoder,
    read_dit,
    read_generator,
    read_text_encoder,
    read_vae,
)
from longlive.weights.formats import weight_files as wan_files
from longlive.weights.lora import attach_lora, check_rank, merge_lora, read_lora

log = logging.getLogger(__name__)

BUILTIN_EXAMPLES = {
    str(ROOT / "example" / theirs): str(ROOT / "example" / ours)
    for theirs, ours in (
        ("long_example.txt", "shapes_prompts.txt"),
        ("interactive_example.jsonl", "shapes_interactive.jsonl"),
    )
}
"""The examples of the shipped configurations, and those in the world of the built-in model."""
STANDIN_OUTPUT_FRAMES = 81
"""20 s: the length of videos where the built-in model stands in and none was asked for."""
PUBLISHED_WEIGHTS = {
    "model_name": "Wan2.1-T2V-1.3B",
    "wan_folder": str(ROOT / "wan_models"),
    "generator_ckpt": str(ROOT / "longlive_models/models/longlive_base.pt"),
    "lora_ckpt": str(ROOT / "longlive_models/models/lora.pt"),
}
"""What the shipped configurations name and `scripts/download_weights.sh` fetches."""


def run_inference(config: InferenceConfig, explicit: frozenset[str]) -> None:
    """Make the videos that a configuration asks for. explicit: keys typed on the command line."""
    config = shorten(choose_model(config, explicit), config, explicit)
    device = choose_device(config.device)
    scripts = load_scripts(config)
    if config.model_name == BUILTIN:
        for prompt in dict.fromkeys(prompt for script in scripts for prompt in script.prompts):
            parse(prompt)  # warns of what the model does not know
    folder = Path(config.output_folder)
    check_writable(folder)
    weights = {str(path): fingerprint(path) for path in weight_files(config)}
    session_config = make_session_config(config)
    jobs = plan_jobs(
        scripts,
        num_samples=config.num_samples,
        seed=config.seed,
        by_index=config.save_with_index,
        identity={
            "weights": list(weights.values()),
            "model": (config.model_name, config.use_ema, config.adapter.alpha, str(choose_dtype(config.dtype, device))),
            "session": session_config,
            "file": (config.fps, config.crf),
        },
    )
    output = OutputConfig(folder, config.fps, config.crf, config.contact_sheet, config.animation, config.overwrite)
    missing = missing_jobs(shard(jobs, rank(), world_size()), output)
    for clip in {job.script.start_from for job in missing}:
        load_clip(clip, session_config, config.fps)  # only to see now whether it can be read
    if missing:
        info = {"config": to_dict(config), "weights": weights, "versions": versions(device)}
        make_videos(
            load_models(config, device),
            session_config,
            output,
            missing,
            batch_size=config.batch_size,
            info=info,
            progress=is_main(),
        )
        log.info("videos are in %s", folder)


def choose_model(config: InferenceConfig, explicit: frozenset[str]) -> InferenceConfig:
    """The configuration itself, or, where no weights are there and none were asked for, that of the built-in model.

    The built-in model has a small picture and a world of its own, so other examples. Settings that are not the shipped
    ones stay.
    """
    wanted = [wan_path(config), *(Path(path) for path in (config.generator_ckpt, config.lora_ckpt) if path)]
    small: dict[str, Any] = {"height": BUILTIN_HEIGHT_PX, "width": BUILTIN_WIDTH_PX}
    if config.model_name != BUILTIN:
        is_own = any(getattr(config, key) not in (None, value) for key, value in PUBLISHED_WEIGHTS.items())
        is_typed = any(getattr(config, key) is not None for key in explicit.intersection(PUBLISHED_WEIGHTS))
        if is_own or is_typed or any(path.exists() for path in wanted):
            return config
        log.warning(
            "No weights found at %s: using the tiny built-in model, which knows moving shapes and no more. "
            "The real weights: bash scripts/download_weights.sh",
            wanted[0],
        )
    shipped = InferenceConfig()
    changes = where_unset(small, config, shipped, explicit)
    if config.data_path in BUILTIN_EXAMPLES and "data_path" not in explicit:
        changes["data_path"] = BUILTIN_EXAMPLES[config.data_path]
    changes |= {k: None for k in ("generator_ckpt", "lora_ckpt") if getattr(config, k) == PUBLISHED_WEIGHTS[k]}
    chosen = replace(config, model_name=BUILTIN, **changes)
    if chosen.generator_ckpt is None:
        own = where_unset(BUILTIN_MODEL_KWARGS, chosen.model_kwargs, shipped.model_kwargs, explicit, "model_kwargs.")
        steps = where_unset({"denoising_step_list": BUILTIN_STEPS}, chosen, shipped, explicit)
        chosen = replace(chosen, model_kwargs=replace(chosen.model_kwargs, **own), **steps)
    return chosen


def where_unset(
    values: Mapping[str, Any], settings: object, shipped: object, explicit: frozenset[str], prefix: str = ""
) -> dict[str, Any]:
    """Those of `values` whose settings were not typed (prefix + key) and are still the shipped ones."""
    return {
        key: value
        for key, value in values.items()
        if prefix + key not in explicit and getattr(settings, key) == getattr(shipped, key)
    }


def shorten(chosen: InferenceConfig, asked: InferenceConfig, explicit: frozenset[str]) -> InferenceConfig:
    """What `choose_model` has chosen, with the first video only, and 20 s of it, where the built-in model stands in for
    the one asked for, so that something is shown at once. inference_iter and num_output_frames, where set, stay."""
    shipped = InferenceConfig()
    if chosen.model_name == asked.model_name:
        return chosen
    is_asked = "num_output_frames" in explicit or asked.num_output_frames != shipped.num_output_frames
    if not is_asked and STANDIN_OUTPUT_FRAMES % asked.num_frame_per_block == 0:
        chosen = replace(chosen, num_output_frames=STANDIN_OUTPUT_FRAMES)
    is_set = "inference_iter" in explicit or asked.inference_iter != shipped.inference_iter
    if asked.prompts or is_set:
        return chosen
    log.warning("Only the first video is made (inference_iter=-1: all).")
    return replace(chosen, inference_iter=1)


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is this process's GPU, or the CPU. Raises InputError where it is not there."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(f"device={name}: no CUDA device is available; use device=auto or device=cpu")
    device = torch.device("cuda", local_rank()) if name in ("auto", "cuda") else torch.device(name)
    if (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device={device}: there are only {torch.cuda.device_count()} CUDA devices")
    torch.cuda.set_device(device)
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute type called `name`; "auto" is bfloat16 on a GPU and float32 on the CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]


def load_scripts(config: InferenceConfig) -> list[Script]:
    """The videos asked for, from `prompt` or from the file `data_path`."""
    timing: dict[str, Any] = {
        "num_frames": config.num_output_frames,
        "frames_per_block": config.num_frame_per_block,
        "switch_frames": config.switch_frame_indices or None,
        "fps": config.fps,
    }
    if config.prompts:
        scripts = [make_script(config.prompts, **timing)]
    else:
        limit = None if config.inference_iter == -1 else config.inference_iter
        scripts = read_scripts(config.data_path, **timing, limit=limit)
    if config.start_from is not None:
        scripts = [replace(script, start_from=script.start_from or config.start_from) for script in scripts]
    return scripts


def make_session_config(config: InferenceConfig) -> SessionConfig:
    """What a session needs to know of the configuration."""
    kwargs = config.model_kwargs
    return SessionConfig(
        height=config.height,
        width=config.width,
        sampler=SamplerConfig(
            steps=tuple(config.denoising_step_list),
            warp=config.warp_denoising_step,
            shift=kwargs.timestep_shift,
            context_timestep=float(config.context_noise),
            frames_per_block=config.num_frame_per_block,
        ),
        cache=CacheConfig(kwargs.local_attn_size, kwargs.sink_size, kwargs.use_infinite_attention),
        switch_policy="keep" if config.global_sink else "rewrite",
    )


def wan_path(config: InferenceConfig) -> Path:
    """The Wan model's folder, original or `-Diffusers` layout."""
    return find_wan_folder(config.wan_folder, config.model_name)


def find_wan_folder(wan_folder: str, name: str) -> Path:
    """The folder of the Wan model called `name`, original or `-Diffusers` layout; it need not exist."""
    path = Path(wan_folder) / name
    diffusers = path.with_name(f"{path.name}-Diffusers")
    return diffusers if diffusers.exists() and not path.exists() else path


def weight_files(config: InferenceConfig) -> list[Path]:
    """The files that the models come from; raises InputError for one that is not there."""
    instead: dict[str, Part[Any]] = {"generator_ckpt": DIT, "vae_ckpt": VAE}  # of Wan's own
    named = {key: getattr(config, key) for key in (*instead, "lora_ckpt")}
    if config.model_name != BUILTIN:
        named["wan_folder"] = str(wan_path(config))
    files = {name: Path(path) for name, path in named.items() if path is not None}
    for name, path in files.items():
        if not path.exists():
            raise InputError(
                f"{name}: {path} does not exist; bash scripts/download_weights.sh fetches the published weights"
            )
    found = []
    if "wan_folder" in files:
        replaced = {part.name for key, part in instead.items() if key in files}
        found += wan_files(files["wan_folder"], [part for part in PARTS.values() if part.name not in replaced])
    if "generator_ckpt" in files:
        found.append(find_weights(DIT, files["generator_ckpt"]))
    elif config.model_name == BUILTIN:
        found.append(BUILTIN_GENERATOR)
    if config.model_name == BUILTIN and "vae_ckpt" not in files:
        found.append(BUILTIN_VAE)
    found += [files[name] for name in ("lora_ckpt", "vae_ckpt") if name in files]
    return found


def load_models(config: InferenceConfig, device: torch.device) -> Models:
    """Generator, VAE and text encoder on `device`, ready for inference. Raises InputError for files that do not fit."""
    dtype = choose_dtype(config.dtype, device)
    folder = None if config.model_name == BUILTIN else wan_path(config)
    log.info("loading %s", folder or "the built-in model")
    generator = load_generator(config, device, dtype)
    vae, encoder = load_vae(folder, dtype, config.vae_ckpt), load_encoder(folder, generator.config.text_len)
    return assemble(config, generator, vae, encoder, device, dtype)


def load_generator(config: InferenceConfig, device: torch.device, dtype: torch.dtype) -> WanDiT:
    """The causal generator: Wan's sizes, the checkpoint's weights, the LoRA merged in or attached."""
    attention = select_attention(config.attention, device, dtype)
    adapter = config.adapter
    lora_path, lora = config.lora_ckpt or "", None if config.lora_ckpt is None else read_lora(config.lora_ckpt)
    if lora is not None:
        check_rank(lora, adapter.rank, lora_path)
    if config.model_name == BUILTIN and config.generator_ckpt is None:
        source: str | Path = BUILTIN_GENERATOR
        dit_config, state = read_dit(source)
    else:
        source = config.generator_ckpt or wan_path(config)
        network = "generator_ema" if config.use_ema and config.generator_ckpt else "generator"
        dit_config, state = read_generator(source, wan_path(config), network)
    check_finite(state, source)
    if lora is not None and config.merge_lora:
        state = merge_lora(state, lora, adapter.alpha, lora_path, dtype)
    with torch.device("meta"):
        generator = WanDiT(dit_config, attention)
    load_into(generator, state, source, dtype)
    if lora is not None and not config.merge_lora:
        attach_lora(generator, adapter.rank, adapter.alpha, lora, lora_path)
    return generator


def load_vae(folder: Path | None, dtype: torch.dtype, vae_ckpt: str | None = None) -> WanVAE:
    """The VAE in `dtype` on the CPU, from the file `vae_ckpt`, a Wan folder, or, without either, the built-in one.

    Raises InputError for files that do not fit.
    """
    source = vae_ckpt or folder or BUILTIN_VAE
    config, state = read_vae(source)
    with torch.device("meta"):
        vae = WanVAE(config)
    check_finite(state, source)
    load_into(vae, state, source, dtype)
    return vae


def load_encoder(folder: Path | None, text_len: int) -> TextEncoder:
    """The text encoder in bfloat16 on the CPU, from a Wan folder, or, from None, the built-in one in float32.

    text_len: tokens of a prompt. Raises InputError for files that do not fit.
    """
    if folder is None:
        return builtin_encoder()
    config, state, tokenizer = read_text_encoder(folder)
    with torch.device("meta"):
        encoder = TextEncoder(replace(config, text_len=text_len), load_tokenizer(tokenizer))
    load_text_encoder(encoder, state, folder, torch.bfloat16)
    return encoder


def assemble(
    config: InferenceConfig,
    generator: WanDiT,
    vae: WanVAE,
    encoder: TextEncoder,
    device: torch.device,
    dtype: torch.dtype,
) -> Models:
    """Move the parts to the device, frozen; compile them if asked."""
    generator.to(device, dtype).eval().requires_grad_(False)
    place_vae(vae, device, dtype)
    if config.compile:
        compile_models(generator, vae)
    return Models(generator, vae, place_encoder(encoder, device, config.low_memory))


def place_vae(vae: WanVAE, device: torch.device, dtype: torch.dtype) -> None:
    """Move the VAE to the device, frozen."""
    vae.to(device, dtype).eval().requires_grad_(False)
    if device.type == "cuda":
        vae.use_channels_last()


def place_encoder(encoder: TextEncoder, device: torch.device, low_memory: bool) -> PromptCache:
    """Move the text encoder to the device; with `low_memory` only for as long as it computes."""
    if low_memory and device.type == "cuda":
        offload(encoder, device)
    else:
        encoder.to(device)
    return PromptCache(encoder.eval(), device)


def compile_models(generator: WanDiT, vae: WanVAE) -> None:
    """Compile one transformer block, which serves all layers, and the decoder."""
    torch._dynamo.config.recompile_limit = 64  # a window filling up, several batch sizes, switches: each its own graph
    for block in generator.blocks:
        block.compile()
    vae.decoder.compile()


def versions(device: torch.device) -> dict[str, Any]:
    """What ran: for the sidecars."""
    return {
        "longlive": longlive.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
    }
