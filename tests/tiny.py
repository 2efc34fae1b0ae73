"""Tiny real models for the tests: random weights, float32, CPU."""

import torch
from torch import nn

from longlive.models.dit import DiTConfig, WanDiT

TINY_DIT = DiTConfig(
    dim=48, ffn_dim=64, num_heads=2, num_layers=2, in_channels=4, out_channels=4, freq_dim=32, text_dim=16, text_len=6
)


def randomize(module: nn.Module, seed: int = 0, std: float = 0.15) -> None:
    """Random parameters everywhere, norms near one: no output is trivially zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * std
        is_norm = "norm" in name and name.endswith("weight")
        parameter.data = (noise + 1 if is_norm else noise).to(parameter.dtype)


def tiny_dit(config: DiTConfig = TINY_DIT, seed: int = 0) -> WanDiT:
    model = WanDiT(config).eval().requires_grad_(False)
    randomize(model, seed)
    return model
