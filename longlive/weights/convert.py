"""Conversion between the layouts of Wan weights, with a LoRA merged on the way: `python -m longlive convert`."""

import argparse
import json
import logging
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longlive.errors import InputError
from longlive.models.dit import DiTConfig, WanDiT
from longlive.models.text_encoder import TextEncoder, byte_tokens
from longlive.models.vae import VAEConfig, WanVAE
from longlive.weights.files import (
    PICKLE_SUFFIXES,
    StateDict,
    atomic_file,
    check_fit,
    read_checkpoint,
    write_json,
    write_pickle,
    write_safetensors,
)
from longlive.weights.formats import DIT, PARTS, TEXT_ENCODER, Part, find_tokenizer, find_weights, holds, read_part
from longlive.weights.lora import lora_rank, merge_lora, read_lora

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

FILES = {
    "longlive": {
        "dit": "dit.safetensors",
        "vae": "vae.safetensors",
        "text_encoder": "text_encoder.safetensors",
        "tokenizer": "tokenizer",
    },
    "wan": {
        "dit": "diffusion_pytorch_model.safetensors",
        "vae": "Wan2.1_VAE.pth",
        "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
        "tokenizer": "google/umt5-xxl",
    },
    "diffusers": {
        "dit": "transformer/diffusion_pytorch_model.safetensors",
        "vae": "vae/diffusion_pytorch_model.safetensors",
        "text_encoder": "text_encoder/model.safetensors",
        "tokenizer": "tokenizer",
    },
}
"""Layout -> where each part goes in the destination folder."""


@dataclass(frozen=True)
class Network:
    """A part as it was read: its config and its weights under original names."""

    part: Part[Any]
    config: Any
    state_dict: StateDict

    def build(self) -> nn.Module:
        """The module without memory for its weights."""
        with torch.device("meta"):
            if self.part is TEXT_ENCODER:
                return TextEncoder(self.config, byte_tokens)
            return WanDiT(self.config) if self.part is DIT else WanVAE(self.config)


def convert(
    source: str | Path,
    destination: str | Path,
    to: str = "longlive",
    *,
    part: str | None = None,
    lora: str | Path | None = None,
    alpha: float | None = None,
    use_ema: bool = False,
    dtype: torch.dtype | None = None,
) -> list[Path]:
    """Write the weights in `source` to `destination` in the layout `to`: `longlive`, `wan` or `diffusers`.

    source: a folder or file in any layout. destination: a folder; or, for one part alone, a `.safetensors` file, which
    gets the tensor names of the layout. part: `dit`, `vae` or `text_encoder` only. lora: merged into the transformer
    with `alpha` (by default its rank, so scale 1). use_ema: the averaged weights of a training checkpoint. dtype: of
    all floating-point tensors. Everything is read and checked before anything is written, and every file is written
    atomically. Returns the files written. Raises `InputError` for what cannot be read, converted or written.
    """
    source, destination = Path(source), Path(destination)
    if destination.suffix in PICKLE_SUFFIXES:
        raise InputError(f"{destination}: a single file must end in .safetensors")
    if alpha is not None and lora is None:
        raise InputError(f"alpha {alpha:g} is that of a LoRA, but none is given; accepted is --alpha with --lora")
    networks = [read_network(found, source, use_ema) for found in _parts_in(source, part)]
    if lora is not None:
        networks = [_with_lora(network, lora, alpha, dtype) for network in networks]
        if not any(network.part is DIT for network in networks):
            raise InputError(f"{source}: has no transformer to merge {lora} into")
    if destination.suffix == ".safetensors":
        if len(networks) > 1:
            names = ", ".join(network.part.name for network in networks)
            raise InputError(
                f"{destination}: one file holds one part, but {source} has {names}; choose one with --part"
            )
        return [_write_weights(networks[0], destination, to, dtype)]
    tokenizer = find_tokenizer(source) if source.is_dir() and TEXT_ENCODER in [n.part for n in networks] else None
    return _write_folder(networks, tokenizer, destination, to, dtype)


def read_network(part: Part[Any], source: Path, use_ema: bool = False) -> Network:
    """Read `part` and check its names and shapes. Raises `InputError` naming the source."""
    config, state_dict = read_part(part, source, "generator_ema" if use_ema and part is DIT else "generator")
    network = Network(part, config, state_dict)
    check_fit(part.to_original(network.build().state_dict()), state_dict, source)
    return network


def _parts_in(source: Path, wanted: str | None) -> list[Part[Any]]:
    if not source.is_dir():
        checkpoint = read_checkpoint(source)
        parts = [next((part for part in PARTS.values() if part.knows(checkpoint)), DIT)]
    else:
        parts = [part for part in PARTS.values() if holds(part, source)]
    chosen = [part for part in parts if wanted in (None, part.name)]
    if not chosen:
        raise InputError(f"{source}: holds no {wanted or 'Wan'} weights in a known layout")
    return chosen


def _with_lora(network: Network, lora: str | Path, alpha: float | None, dtype: torch.dtype | None) -> Network:
    if network.part is not DIT:
        return network
    pairs = read_lora(lora)
    scale_alpha = lora_rank(pairs) if alpha is None else alpha
    return replace(network, state_dict=merge_lora(network.state_dict, pairs, scale_alpha, lora, dtype))


def _write_folder(
    networks: list[Network], tokenizer: Path | None, destination: Path, to: str, dtype: torch.dtype | None
) -> list[Path]:
    paths = FILES[to]
    for network in networks:
        if to == "diffusers" and network.part is DIT and network.config.sees_place:
            raise InputError("diffusers has no transformer whose patches are told where they lie (sees_place)")
        _check_free(network, destination, destination / paths[network.part.name])
    written = []
    for network in networks:
        path = destination / paths[network.part.name]
        written.append(_write_weights(network, path, to, dtype))
        if config := _hub_config(network, to):
            write_json(path.parent / "config.json", config)
    if tokenizer is not None:
        _copy_files(tokenizer, destination / paths["tokenizer"])
    if to == "diffusers" and len(networks) == len(PARTS):
        write_json(destination / "scheduler" / "scheduler_config.json", _SCHEDULER)
        write_json(destination / "model_index.json", _PIPELINE)
    return written


def _check_free(network: Network, destination: Path, path: Path) -> None:
    """Refuse to leave two versions of a part side by side, or to lose a config that a `.pth` has no room for."""
    if holds(network.part, destination) and find_weights(network.part, destination) != path:
        found = find_weights(network.part, destination)
        raise InputError(f"{found}: the destination already has {network.part.name} weights; choose another folder")
    if path.suffix == ".pth" and network.part.config(**network.part.sizes_of(network.state_dict)) != network.config:
        raise InputError(f"{path}: this layout has no place for the {network.part.name} config, which is not Wan's own")


def _write_weights(network: Network, path: Path, to: str, dtype: torch.dtype | None) -> Path:
    part = network.part
    state_dict = part.to_hub(network.state_dict) if to == "diffusers" else network.state_dict
    if path.suffix == ".pth":
        write_pickle(path, state_dict, dtype)
    else:
        metadata = {"part": part.name, "config": json.dumps(asdict(network.config))}
        write_safetensors(path, state_dict, metadata, dtype)
    log.info("wrote %s", path)
    return path


def _copy_files(source: Path, destination: Path) -> None:
    for path in sorted(path for path in source.iterdir() if path.is_file()):
        with path.open("rb") as original, atomic_file(destination / path.name) as copy:
            shutil.copyfileobj(original, copy)


def _hub_config(network: Network, to: str) -> dict[str, Any]:
    """The `config.json` that belongs beside the weights; empty where the layout has none."""
    config = network.config
    if to == "wan" and isinstance(config, DiTConfig):
        return wan_dit_config(config)
    if to != "diffusers":
        return {}
    if isinstance(config, DiTConfig):
        return _diffusers_dit_config(config)
    if isinstance(config, VAEConfig):
        return _diffusers_vae_config(config)
    encoder: Any = network.build()
    return {**encoder.encoder.config.to_dict(), "architectures": ["UMT5EncoderModel"]}


def wan_dit_config(config: DiTConfig) -> dict[str, Any]:
    """The `config.json` of the original layout."""
    values = config.told()
    sizes = {"in_dim": values.pop("in_channels"), "out_dim": values.pop("out_channels")}
    return {"_class_name": "WanModel", "model_type": "t2v", **values, **sizes}


def _diffusers_dit_config(config: DiTConfig) -> dict[str, Any]:
    values = config.told()
    del values["dim"], values["text_len"]
    heads = {"num_attention_heads": values.pop("num_heads"), "attention_head_dim": config.head_dim}
    fixed = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024}
    return {"_class_name": "WanTransformer3DModel", **values, **heads, **fixed}


def _diffusers_vae_config(config: VAEConfig) -> dict[str, Any]:
    values = asdict(config)
    # The misspelling is diffusers' own.
    misspelt = {"temperal_downsample": values.pop("temporal_downsample")}
    return {"_class_name": "AutoencoderKLWan", **values, **misspelt, "attn_scales": [], "dropout": 0.0}


_PIPELINE = {
    "_class_name": "WanPipeline",
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
_SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}


_DESTINATION_HELP = "folder, or .safetensors file for a single part; files already there are replaced"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `python -m longlive convert`."""
    parser.add_argument("source", metavar="SOURCE", help="folder or file with weights, in any layout")
    parser.add_argument("destination", metavar="DEST", help=_DESTINATION_HELP)
    parser.add_argument("--to", choices=list(FILES), default="longlive", help="layout to write (default: longlive)")
    parser.add_argument("--part", choices=list(PARTS), help="only this part (default: all that SOURCE has)")
    parser.add_argument("--lora", metavar="FILE", help="LoRA to merge into the transformer")
    parser.add_argument("--alpha", type=float, metavar="N", help="alpha of --lora (default: its rank, so scale 1)")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights (generator_ema) of a checkpoint")
    parser.add_argument("--dtype", choices=list(DTYPES), help="type of the written weights (default: as they are)")


def run(args: argparse.Namespace) -> None:
    """Convert as the parsed arguments say. Raises `InputError`."""
    convert(
        args.source,
        args.destination,
        args.to,
        part=args.part,
        lora=args.lora,
        alpha=args.alpha,
        use_ema=args.ema,
        dtype=DTYPES[args.dtype] if args.dtype else None,
    )
