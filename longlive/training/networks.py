"""Transformers for training, from weights on disk: trained ones, frozen ones, and the plain copy that rolls out.

Models are made on the meta device, sharded, and only then filled from mapped files, one tensor at a time: no process
ever holds a whole set of weights that it is not to keep.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from longlive.models.attention import AttentionFn
from longlive.models.dit import DiTConfig, Remat, WanDiT
from longlive.quantize import quantize_weights, use_float8
from longlive.training.draw import derived_seed
from longlive.training.parallel import Group, fill, shard
from longlive.weights.files import StateDict, check_fit
from longlive.weights.lora import Lora, attach_lora


@dataclass(frozen=True)
class Weights:
    """A transformer as it was read: config and tensors under original names, views of a file. source: for errors."""

    config: DiTConfig
    state: StateDict
    source: str | Path


@dataclass(frozen=True)
class LoraConfig:
    """LoRA to train. start: the weights to begin with, or None: random A, zero B, drawn from `seed`."""

    rank: int
    alpha: float
    seed: int = 0
    start: Lora | None = None
    source: str | Path = ""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Compute:
    """How a network computes. dtype: of forward and backward passes; is_compiled: blocks are compiled."""

    dtype: torch.dtype
    attention: AttentionFn
    remat: Remat = "selective"
    is_compiled: bool = False


def check_weights(weights: Weights) -> None:
    """Raise InputError unless the tensors have the names and shapes of the config."""
    check_fit(_on_meta(weights.config).state_dict(), weights.state, weights.source)


def make_trained(weights: Weights, lora: LoraConfig | None, group: Group, compute: Compute) -> WanDiT:
    """A sharded transformer whose weights, or LoRA weights, are float32 and get gradients. Raises InputError."""
    model = _on_meta(weights.config, compute)
    values = dict(weights.state)
    if lora is not None:
        with torch.device("meta"):
            attach_lora(model, lora.rank, lora.alpha)
        values = {_beside_lora(name, model): tensor for name, tensor in values.items()} | _lora_values(model, lora)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else compute.dtype)
    _compile(model, compute)
    shard(model, group, compute.dtype)
    fill(model, values.items(), group.device, weights.source)
    return model.eval()


def make_frozen(weights: Weights, group: Group, compute: Compute, is_float8: bool = False) -> WanDiT:
    """A transformer without gradients, in the compute type or FP8; sharded where there are several processes."""
    model = _on_meta(weights.config, compute).to(compute.dtype).requires_grad_(False)
    values: Iterator[tuple[str, Tensor]] = iter(weights.state.items())
    if is_float8:
        use_float8(model, group.device)
        on_device = ((name, tensor.to(group.device, compute.dtype)) for name, tensor in values)
        values = quantize_weights(on_device, model)
    _compile(model, compute)
    if group.world_size > 1:
        shard(model, group, None)
    fill(model, values, group.device, weights.source)
    return model.eval()


def make_rollout_copy(config: DiTConfig, group: Group, compute: Compute) -> WanDiT:
    """A plain transformer on every process, to be given weights by `copy_weights`."""
    model = _on_meta(config, compute).to(compute.dtype).requires_grad_(False).to_empty(device=group.device)
    _compile(model, compute)
    return model.eval()


def _on_meta(config: DiTConfig, compute: Compute | None = None) -> WanDiT:
    with torch.device("meta"):
        return WanDiT(config) if compute is None else WanDiT(config, compute.attention, compute.remat)


def _compile(model: WanDiT, compute: Compute) -> None:
    """Compile the forward functions of the blocks, inside of which FSDP has no hooks."""
    if compute.is_compiled:
        torch._dynamo.config.recompile_limit = 64  # a window filling up, with and without gradient: each its own graph
        for block in model.blocks:
            block.forward = torch.compile(block.forward)


def _beside_lora(name: str, model: WanDiT) -> str:
    """The name of a weight, which peft changes where a LoRA lies beside it."""
    module, _, kind = name.rpartition(".")
    return f"{module}.base_layer.{kind}" if hasattr(model.get_submodule(module), "base_layer") else name


def _lora_values(model: WanDiT, lora: LoraConfig) -> dict[str, Tensor]:
    """What LoRA weights begin with, by peft's names: A uniform as for a linear layer, B zero (arXiv 2106.09685)."""
    values = {}
    for name, parameter in model.named_parameters():
        module, is_lora, side = name.partition(".lora_")
        if not is_lora:
            continue
        if lora.start is not None:
            values[name] = lora.start[module][0 if side.startswith("A") else 1]
        elif side.startswith("A"):
            generator = torch.Generator().manual_seed(derived_seed(lora.seed, "lora", name))
            bound = parameter.shape[1] ** -0.5
            values[name] = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
        else:
            values[name] = torch.zeros(parameter.shape)
    return values
