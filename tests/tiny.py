"""Tiny real models for the tests: random weights, float32, CPU."""

import torch
from torch import nn

from longlive.inference.session import Models
from longlive.models.dit import DiTConfig, WanDiT
from longlive.models.text_encoder import PromptCache, TextEncoder, TextEncoderConfig, byte_tokens
from longlive.models.vae import VAEConfig, WanVAE

TINY_DIT = DiTConfig(
    dim=48, ffn_dim=64, num_heads=2, num_layers=2, in_channels=4, out_channels=4, freq_dim=32, text_dim=16, text_len=6
)
TINY_VAE = VAEConfig(base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
TINY_TEXT = TextEncoderConfig(
    vocab_size=384, dim=16, dim_attn=16, dim_ffn=32, num_heads=2, num_layers=1, text_len=TINY_DIT.text_len
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


def tiny_models(seed: int = 0) -> Models:
    """A session's models at the smallest size that still has every part: 8x8 px a latent, 2x2 latents a token."""
    vae = WanVAE(TINY_VAE).eval().requires_grad_(False)
    encoder = TextEncoder(TINY_TEXT, byte_tokens).eval()
    randomize(vae, seed, std=0.25)
    randomize(encoder, seed)
    return Models(tiny_dit(seed=seed), vae, PromptCache(encoder, torch.device("cpu")))
