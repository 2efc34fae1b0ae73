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
from longlive.training.checkpoint import read_identity, read_keys, read_state
from longlive.training.networks import Weights
from longlive.training.vae_stage import with_latent_statistics
from longlive.weights.convert import wan_dit_config
from longlive.weights.files import StateDict, atomic_file, write_json, write_safetensors
from longlive.weights.lora import merge_lora, parse_lora, peft_names

GENERATOR, CRITIC = "generator.safetensors", "critic.safetensors"
VAE = "vae.safetensors"
BASE, LORA = "longlive_base.pt", "lora.pt"


def export(checkpoint: Path, folder: Path, base: Weights | None, alpha: float) -> list[Path]:
    """Write the weights in a checkpoint to a folder; returns the files.

    base: the generator that a LoRA lies beside, None where all was trained; alpha: of the LoRA. Raises InputError when
    the checkpoint cannot be read or the folder not written.
    """
    identity, keys = read_identity(checkpoint), read_keys(checkpoint)
    generator, critic = (dit_config(identity[name]) for name in ("generator", "critic"))
    assert generator is not None
    found: dict[str, StateDict] = {}
    for entry, prefix in (
        ("generator", "networks.generator.weights"),
        ("generator_ema", "networks.generator.ema"),
        ("critic", "networks.critic.weights"),
    ):
        if any(key.startswith(f"{prefix}.") for key in keys):
            found[entry] = read_state(checkpoint, prefix)
    loras = {entry: peft_names(state) for entry, state in found.items() if is_lora(state)}
    whole = {entry: state for entry, state in found.items() if entry not in loras}
    written = [folder / GENERATOR]
    averaged = found.get("generator_ema", found["generator"])
    if is_lora(averaged):
        assert base is not None
        averaged = merge_lora(base.state, parse_lora(peft_names(averaged), checkpoint), alpha, checkpoint)
    _write_dit(written[0], averaged, generator)
    if "critic" in whole and critic is not None:
        written.append(folder / CRITIC)
        _write_dit(written[-1], whole["critic"], critic)
    if loras:
        written.append(folder / LORA)
        _write_pickle(written[-1], {f"{entry}_lora": state for entry, state in loras.items()})
    if whole:
        write_json(folder / "config.json", wan_dit_config(generator))  # which the layout has no room for
        written.append(folder / BASE)
        _write_pickle(
            written[-1],
            {entry: {f"model.{name}": tensor for name, tensor in state.items()} for entry, state in whole.items()},
        )
    return written


def dit_config(sizes: dict[str, Any] | None) -> DiTConfig | None:
    """The config of a transformer as a checkpoint tells it."""
    return None if sizes is None else DiTConfig(**{**sizes, "patch_size": tuple(sizes["patch_size"])})


def export_vae(checkpoint: Path, folder: Path, batches: Iterable[Tensor], device: torch.device) -> list[Path]:
    """Write a trained VAE, averaged where there is an average, with the statistics of its latents over batches of
    pixels [B, V, 3, H, W] on the device. Returns and raises as `export` does."""
    sizes: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in read_identity(checkpoint)["vae"].items()
    }
    has_average = any(key.startswith("networks.vae.ema.") for key in read_keys(checkpoint))
    state = read_state(checkpoint, f"networks.vae.{'ema' if has_average else 'weights'}")
    state = {name.removeprefix("vae."): tensor for name, tensor in state.items()}
    vae = WanVAE(VAEConfig(**sizes))
    vae.load_state_dict(state)
    vae.to(device)
    metadata = {"part": "vae", "config": json.dumps(asdict(with_latent_statistics(vae, batches)))}
    write_safetensors(folder / VAE, state, metadata)
    return [folder / VAE]


def is_lora(state: StateDict) -> bool:
    return any(".lora_" in name for name in state)


def _write_dit(path: Path, state: StateDict, config: DiTConfig) -> None:
    write_safetensors(path, state, {"part": "dit", "config": json.dumps(asdict(config))})


def _write_pickle(path: Path, content: dict[str, Any]) -> None:
    with atomic_file(path) as file:
        torch.save(content, file)
