"""The layouts Wan weights come in, and the way from each to the original Wan names, which our modules use.

Layouts: `wan` (the original folder: `diffusion_pytorch_model*.safetensors`, `Wan2.1_VAE.pth`, ...), `diffusers` (its
`-Diffusers` variant: `transformer/`, `vae/`, ...), `longlive` (ours: `dit.safetensors`, `vae.safetensors`, ..., with
original names and the config in the metadata), and checkpoints of Self-Forcing and LongLive (`longlive_base.pt`).
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, get_type_hints

import torch

from longlive.errors import InputError
from longlive.models.dit import DiTConfig
from longlive.models.text_encoder import TextEncoder, TextEncoderConfig
from longlive.models.vae import VAEConfig
from longlive.weights.files import (
    StateDict,
    check_fit,
    load_into,
    parse_json,
    read_checkpoint,
    read_json,
    read_metadata,
    shorten,
    state_dict_of,
)

Config = TypeVar("Config", DiTConfig, VAEConfig, TextEncoderConfig)
Names = dict[str, str]
"""Leading components of a tensor's name -> what they are called in another scheme."""

WAN_HEADS = {1536: 12, 5120: 40}  # width of the 1.3B and 14B models -> number of heads

# --- names ------------------------------------------------------------------------------------------------------------


def rename(state_dict: StateDict, names: Names) -> StateDict:
    """Replace the longest known leading part of every name; a name without any stays as it is."""
    return {_new_name(name, names): tensor for name, tensor in state_dict.items()}


def _new_name(name: str, names: Names) -> str:
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        head = ".".join(parts[:n])
        if head in names:
            return ".".join([names[head], *parts[n:]])
    return name


def inverse(names: Names) -> Names:
    return {new: old for old, new in names.items()}


_DIT_NAMES = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_DIT_BLOCK_NAMES = {
    "modulation": "scale_shift_table",
    "self_attn": "attn1",
    "cross_attn": "attn2",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
_DIT_PROJECTION_NAMES = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}


def dit_names(num_layers: int) -> Names:
    """Original -> diffusers names of a transformer."""
    block = dict(_DIT_BLOCK_NAMES)
    for wan, diffusers in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        block |= {f"{wan}.{old}": f"{diffusers}.{new}" for old, new in _DIT_PROJECTION_NAMES.items()}
    layers = range(num_layers)
    return _DIT_NAMES | {f"blocks.{n}.{old}": f"blocks.{n}.{new}" for n in layers for old, new in block.items()}


_VAE_NAMES = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
_VAE_CODER_NAMES = {
    "conv1": "conv_in",
    "middle.0": "mid_block.resnets.0",
    "middle.1": "mid_block.attentions.0",
    "middle.2": "mid_block.resnets.1",
    "head.0": "norm_out",
    "head.2": "conv_out",
}
_VAE_RESIDUAL_NAMES = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}


def vae_names(num_levels: int, num_res_blocks: int) -> Names:
    """Original -> diffusers names of a VAE. Levels are flat in Wan; diffusers nests those of the decoder."""
    names = dict(_VAE_NAMES)
    residuals: Names = {}
    for coder in ("encoder", "decoder"):
        names |= {f"{coder}.{old}": f"{coder}.{new}" for old, new in _VAE_CODER_NAMES.items()}
        residuals |= {f"{coder}.middle.{i}": f"{coder}.{_VAE_CODER_NAMES[f'middle.{i}']}" for i in (0, 2)}
    for n in range(num_levels * (num_res_blocks + 1)):
        names[f"encoder.downsamples.{n}"] = residuals[f"encoder.downsamples.{n}"] = f"encoder.down_blocks.{n}"
    for n in range(num_levels * (num_res_blocks + 2)):
        level, i = divmod(n, num_res_blocks + 2)
        if i <= num_res_blocks:
            residuals[f"decoder.upsamples.{n}"] = f"decoder.up_blocks.{level}.resnets.{i}"
        else:
            names[f"decoder.upsamples.{n}"] = f"decoder.up_blocks.{level}.upsamplers.0"
    for block, new_block in residuals.items():
        names |= {f"{block}.{old}": f"{new_block}.{new}" for old, new in _VAE_RESIDUAL_NAMES.items()}
    return names


_TEXT_ENCODER_NAMES = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
_TEXT_ENCODER_BLOCK_NAMES = {
    "norm1": "layer.0.layer_norm",
    "attn": "layer.0.SelfAttention",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
# The embedding has two names in transformers: either may be in a file, and our module, which is only a part of
# transformers' model, has this one.
_EMBEDDING_ALIAS = {"encoder.embed_tokens": "token_embedding"}


def text_encoder_names(num_layers: int) -> Names:
    """Original -> transformers names of a UMT5 encoder."""
    blocks = {
        f"blocks.{n}.{old}": f"encoder.block.{n}.{new}"
        for n in range(num_layers)
        for old, new in _TEXT_ENCODER_BLOCK_NAMES.items()
    }
    return _TEXT_ENCODER_NAMES | blocks


# --- sizes, from names and shapes -------------------------------------------------------------------------------------


def _count(state_dict: StateDict, pattern: str) -> int:
    """One more than the largest number that `pattern` finds in the names."""
    return max((int(found[1]) for name in state_dict if (found := re.match(pattern, name))), default=-1) + 1


def _dit_names_of(state_dict: StateDict) -> Names:
    return dit_names(_count(state_dict, r"blocks\.(\d+)\."))


def _text_encoder_names_of(state_dict: StateDict) -> Names:
    return text_encoder_names(_count(state_dict, r"(?:encoder\.block|blocks)\.(\d+)\."))


def _vae_depth(state_dict: StateDict) -> tuple[int, int]:
    """Number of levels and of residual blocks per level: a resampling layer ends every level but the last."""
    pattern = re.compile(r"encoder\.(?:downsamples|down_blocks)\.(\d+)\.resample\.1\.weight")
    resamples = [int(found[1]) for name in state_dict if (found := pattern.match(name))]
    num_blocks = _count(state_dict, r"encoder\.(?:downsamples|down_blocks)\.(\d+)\.")
    return len(resamples) + 1, min(resamples, default=num_blocks)


def _vae_names_of(state_dict: StateDict) -> Names:
    return vae_names(*_vae_depth(state_dict))


def _dit_sizes(state_dict: StateDict) -> dict[str, Any]:
    """What shapes tell of a `DiTConfig`. Not the number of heads: Wan's are known, others get 0. Where a model is told
    to see places, its `in_channels` are told too."""
    dim, in_channels, *patch_size = state_dict["patch_embedding.weight"].shape
    patch_height, patch_width = patch_size[1:]
    return {
        "dim": dim,
        "ffn_dim": state_dict["blocks.0.ffn.0.weight"].shape[0],
        "num_heads": WAN_HEADS.get(dim, 0),
        "num_layers": _count(state_dict, r"blocks\.(\d+)\."),
        "in_channels": in_channels,
        "out_channels": state_dict["head.head.weight"].shape[0] // (patch_height * patch_width),
        "freq_dim": state_dict["time_embedding.0.weight"].shape[1],
        "text_dim": state_dict["text_embedding.0.weight"].shape[1],
        "patch_size": tuple(patch_size),
    }


def _vae_sizes(state_dict: StateDict) -> dict[str, Any]:
    num_levels, num_res_blocks = _vae_depth(state_dict)
    base_dim = state_dict["encoder.conv1.weight"].shape[0]
    firsts = range(0, num_levels * (num_res_blocks + 1), num_res_blocks + 1)
    dims = [state_dict[f"encoder.downsamples.{n}.residual.2.weight"].shape[0] for n in firsts]
    return {
        "base_dim": base_dim,
        "z_dim": state_dict["conv2.weight"].shape[0],
        "dim_mult": tuple(dim // base_dim for dim in dims),
        "num_res_blocks": num_res_blocks,
        "temporal_downsample": tuple(f"encoder.downsamples.{n - 1}.time_conv.weight" in state_dict for n in firsts[1:]),
    }


def _text_encoder_sizes(state_dict: StateDict) -> dict[str, Any]:
    vocab_size, dim = state_dict["token_embedding.weight"].shape
    num_buckets, num_heads = state_dict["blocks.0.pos_embedding.embedding.weight"].shape
    return {
        "vocab_size": vocab_size,
        "dim": dim,
        "dim_attn": state_dict["blocks.0.attn.q.weight"].shape[0],
        "dim_ffn": state_dict["blocks.0.ffn.fc1.weight"].shape[0],
        "num_heads": num_heads,
        "num_layers": _count(state_dict, r"blocks\.(\d+)\."),
        "num_buckets": num_buckets,
    }


# --- parts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part(Generic[Config]):
    """One of the networks of a Wan model: where the layouts keep it and how its tensors and sizes are called.

    name: also the stem of its file in our layout. places: glob patterns within a folder, the first that matches holds
    the weights. original_key, hub_keys: tensors that tell whose names a state dict has. config_key: a `config.json`
    without it describes something else. names_of: original -> hub names, for a state dict in either scheme. sizes_of:
    config fields from a state dict with original names. aliases: more hub names of tensors -> original names.
    model_type: the only one that a config may tell.
    """

    name: str
    config: type[Config]
    places: tuple[str, ...]
    original_key: str
    hub_keys: tuple[str, ...]
    config_key: str
    names_of: Callable[[StateDict], Names]
    sizes_of: Callable[[StateDict], dict[str, Any]]
    aliases: Names = field(default_factory=dict)
    model_type: str | None = None

    def knows(self, state_dict: StateDict) -> bool:
        """Whether these are weights of this network, by any names."""
        return any(key in state_dict for key in (self.original_key, *self.hub_keys))

    def to_original(self, state_dict: StateDict) -> StateDict:
        """The same tensors under original Wan names."""
        if self.original_key in state_dict:
            return dict(state_dict)
        return rename(state_dict, inverse(self.names_of(state_dict)) | self.aliases)

    def to_hub(self, state_dict: StateDict) -> StateDict:
        """The same tensors, which have original names, under those of diffusers or transformers."""
        return rename(state_dict, self.names_of(state_dict))


DIT = Part(
    name="dit",
    config=DiTConfig,
    places=(
        "dit.safetensors",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "transformer/diffusion_pytorch_model*.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model*.safetensors",
    ),
    original_key="head.modulation",
    hub_keys=("proj_out.weight",),
    config_key="ffn_dim",
    names_of=_dit_names_of,
    sizes_of=_dit_sizes,
    model_type="t2v",
)
VAE = Part(
    name="vae",
    config=VAEConfig,
    places=("vae.safetensors", "vae/diffusion_pytorch_model*.safetensors", "Wan2.1_VAE.pth"),
    original_key="encoder.conv1.weight",
    hub_keys=("encoder.conv_in.weight",),
    config_key="z_dim",
    names_of=_vae_names_of,
    sizes_of=_vae_sizes,
)
TEXT_ENCODER = Part(
    name="text_encoder",
    config=TextEncoderConfig,
    places=(
        "text_encoder.safetensors",
        "text_encoder/model.safetensors.index.json",
        "text_encoder/model*.safetensors",
        "models_t5_umt5-xxl-enc-bf16.pth",
    ),
    original_key="token_embedding.weight",
    hub_keys=("encoder.embed_tokens.weight", "shared.weight"),
    config_key="d_model",
    names_of=_text_encoder_names_of,
    sizes_of=_text_encoder_sizes,
    aliases=_EMBEDDING_ALIAS,
    model_type="umt5",
)
PARTS: dict[str, Part[Any]] = {part.name: part for part in (DIT, VAE, TEXT_ENCODER)}
TOKENIZER_PLACES = ("tokenizer", "google/umt5-xxl")

# --- reading ----------------------------------------------------------------------------------------------------------

_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def unwrap_name(name: str) -> str:
    """A parameter's own name without what FSDP, activation checkpointing and torch.compile put in between."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("model.")


def select_network(checkpoint: Mapping[str, Any], source: str | Path, network: str = "generator") -> StateDict:
    """State dict, with original names, of one transformer in a checkpoint of any kind.

    `network`: `generator` (in a training checkpoint the entry `generator` or `model`; or all of a plain state dict),
    `generator_ema` or `critic`. Raises `InputError` naming the entries found where it is not there.
    """
    entries = ("generator", "model") if network == "generator" else (network,)
    chosen = next((checkpoint[entry] for entry in entries if isinstance(checkpoint.get(entry), Mapping)), None)
    if chosen is None:
        nested = [name for name, value in checkpoint.items() if isinstance(value, Mapping)]
        if nested or network != "generator":
            found = f"it holds {shorten(nested)}" if nested else "it is a plain state dict"
            raise InputError(f"{source}: has no {' or '.join(entries)}; {found}")
        chosen = checkpoint
    state_dict = {unwrap_name(name): tensor for name, tensor in state_dict_of(chosen, source).items()}
    return DIT.to_original(state_dict)


def has_network(path: str | Path, network: str) -> bool:
    """Whether a file is a training checkpoint with an entry of this name. Raises `InputError` for an unreadable one."""
    return isinstance(read_checkpoint(find_weights(DIT, path)).get(network), Mapping)


def find_weights(part: Part[Any], path: str | Path) -> Path:
    """The file that holds `part`: `path` itself, or where the layouts keep it in the folder `path`."""
    path = Path(path)
    if not path.is_dir():
        return path
    for pattern in part.places:
        found = sorted(path.glob(pattern))
        if len(found) > 1:
            raise InputError(f"{path}: several files match {pattern} and there is no index; name one file")
        if found:
            return found[0]
    raise InputError(f"{path}: no {part.name} weights there; looked for {', '.join(part.places)}")


def holds(part: Part[Any], folder: Path) -> bool:
    """Whether `folder` has weights of `part`, in any layout."""
    return any(any(folder.glob(pattern)) for pattern in part.places)


def find_tokenizer(path: str | Path) -> Path:
    """The tokenizer's folder in the model folder `path`, or beside the text encoder's weights file `path`."""
    path = Path(path)
    roots = [path] if path.is_dir() else [path.parent, path.parent.parent]
    for folder in (root / place for root in roots for place in TOKENIZER_PLACES):
        if (folder / "tokenizer.json").is_file():
            return folder
    places = ", ".join(f"{place}/tokenizer.json" for place in TOKENIZER_PLACES)
    raise InputError(f"{path}: no tokenizer there; looked for {places}")


def weight_files(folder: Path, parts: Iterable[Part[Any]] = PARTS.values()) -> list[Path]:
    """The files that `parts` are read from in a Wan folder, then `tokenizer.json`.

    Of a sharded part this is the index. Raises `InputError` for what is not there, as `find_weights` does.
    """
    return [*(find_weights(part, folder) for part in parts), find_tokenizer(folder) / "tokenizer.json"]


def read_part(
    part: Part[Config], path: str | Path, network: str = "generator", folder: Path | None = None
) -> tuple[Config, StateDict]:
    """Sizes and weights (original names, views of the file) of `part` from a file or a folder in any layout.

    Sizes are told as in `make_config`. `network` chooses in training checkpoints, see `select_network`. Raises
    `InputError` naming the file.
    """
    file = find_weights(part, path)
    checkpoint = read_checkpoint(file)
    if part is DIT:
        state_dict = select_network(checkpoint, file, network)
    else:
        state_dict = part.to_original(state_dict_of(checkpoint, file))
    return make_config(part, state_dict, file, folder), state_dict


def read_dit(path: str | Path, network: str = "generator") -> tuple[DiTConfig, StateDict]:
    """`read_part` for the transformer. Without a config only Wan's own widths are accepted."""
    return read_part(DIT, path, network)


def read_generator(checkpoint: str | Path, wan_folder: Path, network: str = "generator") -> tuple[DiTConfig, StateDict]:
    """`read_part` for a transformer whose file may not tell its config: then it is the one told in `wan_folder`.

    `wan_folder` needs no weights of a transformer, and need not exist.
    """
    return read_part(DIT, checkpoint, network, wan_folder)


def read_vae(path: str | Path) -> tuple[VAEConfig, StateDict]:
    """`read_part` for the VAE."""
    return read_part(VAE, path)


def read_text_encoder(path: str | Path) -> tuple[TextEncoderConfig, StateDict, Path]:
    """`read_part` for the text encoder, and the folder of its tokenizer."""
    return *read_part(TEXT_ENCODER, path), find_tokenizer(path)


def load_text_encoder(
    encoder: TextEncoder, state_dict: StateDict, source: str | Path, dtype: torch.dtype | None = None
) -> None:
    """`load_into` for the text encoder, whose module has transformers' names: `state_dict` and errors have Wan's."""
    check_fit(TEXT_ENCODER.to_original(encoder.state_dict()), state_dict, source)
    names = text_encoder_names(encoder.config.num_layers) | inverse(_EMBEDDING_ALIAS)
    load_into(encoder, rename(state_dict, names), source, dtype)


_CONFIG_NAMES = {
    "num_attention_heads": "num_heads",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "temperal_downsample": "temporal_downsample",
    "layer_norm_epsilon": "eps",
    "relative_attention_max_distance": "max_distance",
}


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _list_of(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(accepts, value)) and len(value) > 0


_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("a positive whole number", _is_size),
    bool: ("true or false", lambda value: type(value) is bool),
    float: ("a positive number", lambda value: _is_number(value) and value > 0),
    tuple[int, int, int]: ("three positive whole numbers", lambda v: _list_of(_is_size)(v) and len(v) == 3),
    tuple[int, ...]: ("a list of positive whole numbers", _list_of(_is_size)),
    tuple[float, ...]: ("a list of numbers", _list_of(_is_number)),
    tuple[bool, ...]: ("a list of true and false", _list_of(lambda value: type(value) is bool)),
}
"""Type of a config field -> what it may be in JSON, in words and as a test."""


def make_config(part: Part[Config], state_dict: StateDict, file: Path, folder: Path | None = None) -> Config:
    """The config of weights with original names, which were read from `file`.

    Told by our metadata in `file` or a `config.json` beside it; else, where a model `folder` in any layout is given,
    by the same there; what is not told follows from shapes. Raises `InputError` naming the file at fault.
    """
    source, told = _told_config(part, file, folder)
    known = _known_values(part, told, source)
    try:
        values = part.sizes_of(state_dict) | known
    except KeyError as error:
        raise InputError(f"{file}: not {part.name} weights; missing: {error.args[0]}") from error
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{file}: the shapes are not those of {part.name} weights ({error})") from error
    if values.get("num_heads") == 0:
        raise InputError(f"{file}: the number of heads is not known; a config.json with num_heads is needed beside it")
    try:
        return part.config(**values)
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error


def _known_values(part: Part[Any], told: dict[str, Any], source: Path) -> dict[str, Any]:
    """The entries of a config that are fields of ours, as these; what is null is not told."""
    if told.get("model_type", part.model_type) != part.model_type:
        raise InputError(f"{source}: model_type is {told['model_type']!r}, accepted is {part.model_type!r}")
    kinds = get_type_hints(part.config)
    known = {}
    for key, value in told.items():
        name = _CONFIG_NAMES.get(key, key)
        if name not in kinds or value is None:
            continue
        wanted, accepts = _KINDS[kinds[name]]
        if not accepts(value):
            raise InputError(f"{source}: {key} is {value!r}, accepted is {wanted}")
        known[name] = tuple(value) if isinstance(value, list) else value
    return known


def _told_config(part: Part[Any], file: Path, folder: Path | None) -> tuple[Path, dict[str, Any]]:
    """The file that tells the config of `part`, and all its entries; none, of `file`, where no config is found."""
    found = _config_at(part, file, [file.parent])
    if found is None and folder is not None:
        places = [(folder / place).parent for place in part.places]
        found = _config_at(part, folder / f"{part.name}.safetensors", places)
    return found or (file, {})


def _config_at(part: Part[Any], file: Path, folders: list[Path]) -> tuple[Path, dict[str, Any]] | None:
    """Config entries from our metadata in `file`, or from a `config.json` in `folders` that is about `part`."""
    if file.suffix == ".safetensors" and file.is_file():
        metadata = read_metadata(file)
        if metadata.get("part") == part.name:
            return file, parse_json(metadata.get("config", ""), file)
    for path in (folder / "config.json" for folder in folders):
        if path.is_file() and part.config_key in (config := read_json(path)):
            return path, config
    return None
