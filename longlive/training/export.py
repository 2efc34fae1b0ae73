"""From a training checkpoint to weights that inference loads, in the published layouts and in safetensors.

Trained in full: `longlive_base.pt` with the entries generator, generator_ema and critic. Trained by LoRA: `lora.pt`
with generator_lora, generator_ema_lora and critic_lora, by peft's names. Always `generator.safetensors`: the whole
generator, averaged where there is an average, its LoRA merged in; and the critic, where it was trained in full.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longlive.models.dit import DiTConfig
from longlive.models.vae import VAEConfig, WanVAE
from longlive.training.checkpoint import read_keys, read_state
from longlive.training.networks import Weights
from longlive.training.vae_stage import with_latent_statistics
from longlive.weights.convert import wan_dit_config
from longlive.weights.files import StateDict, atomic_file, write_json, write_safetensors
from longlive.weights.lora import merge_lora, parse_lora

GENERATOR, CRITIC = "generator.safetensors", "critic.safetensors"
BASE, LORA = "longlive_base.pt", "lora.pt"


def export(checkpoint: Path, folder: Path, generator: Weights, critic: Weights | None, alpha: float) -> list[Path]:
    """Write the weights in a checkpoint to a folder; returns the files.

    generator, critic: what training began with, which a LoRA lies beside; alpha: of the LoRA. Raises InputError when
    the checkpoint cannot be read or the folder not written.
    """
    keys = read_keys(checkpoint)
    found: dict[str, StateDict] = {}
    for entry, prefix in (
        ("generator", "networks.generator.weights"),
        ("generator_ema", "networks.generator.ema"),
        ("critic", "networks.critic.weights"),
    ):
        if any(key.startswith(f"{prefix}.") for key in keys):
            found[entry] = read_state(checkpoint, prefix)
    loras = {entry: _peft_names(state) for entry, state in found.items() if is_lora(state)}
    whole = {entry: state for entry, state in found.items() if entry not in loras}
    written = [folder / GENERATOR]
    averaged = found.get("generator_ema", found["generator"])
    if is_lora(averaged):
        pairs = parse_lora(_peft_names(averaged), checkpoint)
        averaged = merge_lora(generator.state, pairs, alpha, checkpoint)
    _write_dit(written[0], averaged, generator.config)
    if "critic" in whole and critic is not None:
        written.append(folder / CRITIC)
        _write_dit(written[-1], whole["critic"], critic.config)
    if loras:
        written.append(folder / LORA)
        _write_pickle(written[-1], {f"{entry}_lora": state for entry, state in loras.items()})
    if whole:
        write_json(folder / "config.json", wan_dit_config(generator.config))  # which the layout has no room for
        written.append(folder / BASE)
        _write_pickle(
            written[-1],
            {entry: {f"model.{name}": tensor for name, tensor in state.items()} for entry, state in whole.items()},
        )
    return written


def export_vae(checkpoint: Path, path: Path, config: VAEConfig, batches: Iterable[Tensor]) -> None:
    """Write a trained VAE, averaged where there is an average, with the statistics of its latents over batches of
    pixels [B, V, 3, H, W]. Raises InputError as `export` does."""
    prefix = "networks.vae.ema" if any(k.startswith("networks.vae.ema.") for k in read_keys(checkpoint)) else None
    state = read_state(checkpoint, prefix or "networks.vae.weights")
    state = {name.removeprefix("vae."): tensor for name, tensor in state.items()}
    vae = WanVAE(config)
    vae.load_state_dict(state)
    metadata = {"part": "vae", "config": json.dumps(asdict(with_latent_statistics(vae, batches)))}
    write_safetensors(path, state, metadata)


def is_lora(state: StateDict) -> bool:
    return any(".lora_" in name for name in state)


def _peft_names(state: StateDict) -> StateDict:
    """LoRA weights under the names of peft's files."""
    return {f"base_model.model.{name.replace('.default', '')}": tensor for name, tensor in state.items()}


def _write_dit(path: Path, state: StateDict, config: DiTConfig) -> None:
    write_safetensors(path, state, {"part": "dit", "config": json.dumps(asdict(config))})


def _write_pickle(path: Path, content: dict[str, Any]) -> None:
    with atomic_file(path) as file:
        torch.save(content, file)
