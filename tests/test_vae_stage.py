"""Training a VAE: the pass over a whole clip, gradients, the loss and what falls, the statistics of latents."""

import math

import pytest
import torch
from tiny import randomize
from torch import Tensor

from longlive.errors import InputError
from longlive.models.vae import VAEConfig, WanVAE
from longlive.training.vae_stage import (
    Autoencoder,
    VAELossConfig,
    latent_shape,
    pixel_weights,
    vae_loss,
    with_latent_statistics,
)


def vae_config(dim_mult: tuple[int, ...], temporal_downsample: tuple[bool, ...]) -> VAEConfig:
    return VAEConfig(
        base_dim=8,
        z_dim=4,
        dim_mult=dim_mult,
        num_res_blocks=1,
        temporal_downsample=temporal_downsample,
        latents_mean=(0.1, -0.2, 0.3, 0.0),
        latents_std=(0.5, 2.0, 1.5, 1.0),
    )


TWO_LEVELS = vae_config((1, 2), (True,))
FOUR_LEVELS = vae_config((1, 1, 2, 2), (False, True, True))
NO_TIME = vae_config((1, 1), (False,))


def toy_clips(batch: int = 2, num_video_frames: int = 5) -> Tensor:
    """A bright 4x4 px square that moves to the right over a plain dark background, [B, V, 3, 16, 24]."""
    pixels = torch.full((batch, num_video_frames, 3, 16, 24), -0.5)
    for sample in range(batch):
        for frame in range(num_video_frames):
            left, top = 2 * frame + sample, 3 + 5 * sample
            pixels[sample, frame, :, top : top + 4, left : left + 4] = torch.tensor([0.8, 0.3, -0.9])[:, None, None]
    return pixels


# --- one pass over a whole clip ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TWO_LEVELS, FOUR_LEVELS, NO_TIME])
@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_one_pass_equals_chunks(config: VAEConfig, num_frames: int) -> None:
    vae = WanVAE(config)
    randomize(vae, std=0.2)
    pixels = torch.rand(2, 1 + config.temporal_factor * (num_frames - 1), 3, 16, 24) * 2 - 1
    mean, _log_variance = vae.encode_distribution(pixels)
    latents = (mean - vae.latents_mean.view(-1, 1, 1)) / vae.latents_std.view(-1, 1, 1)
    assert latents.shape == latent_shape(pixels, config)
    torch.testing.assert_close(latents, vae.encode(pixels), atol=1e-5, rtol=1e-5)
    decoded = vae.decode_unnormalized(mean)
    torch.testing.assert_close(decoded, vae.decode(latents), atol=1e-5, rtol=1e-5)

    # The gradients agree too.
    cotangent = torch.randn_like(decoded)
    expected = torch.autograd.grad(vae.decode(vae.encode(pixels)), list(vae.parameters()), cotangent, allow_unused=True)
    actual = torch.autograd.grad(decoded, list(vae.parameters()), cotangent, allow_unused=True)
    for (name, _), one, other in zip(vae.named_parameters(), actual, expected, strict=True):
        assert (one is None) == (other is None), name
        if one is not None and other is not None:
            assert (one - other).norm() <= 1e-4 * other.norm() + 1e-6, name


@pytest.mark.parametrize("coder", ["encoder", "decoder"])
def test_a_stream_may_go_on_after_one_pass(coder: str) -> None:
    vae = WanVAE(FOUR_LEVELS).requires_grad_(False)
    randomize(vae, std=0.2)
    x = torch.randn(1, 3, 17, 8, 16) if coder == "encoder" else torch.randn(1, 4, 5, 2, 3)
    later = range(1, x.shape[2], 4) if coder == "encoder" else range(1, x.shape[2])
    past: list[Tensor] = []
    for chunk in x.tensor_split(tuple(later), dim=2):
        _, past = getattr(vae, coder)(chunk, past)
    _, whole = getattr(vae, coder)(x, [])
    torch.testing.assert_close(whole, past, atol=1e-5, rtol=1e-5)


def test_what_is_decoded_is_a_draw_from_the_posterior() -> None:
    autoencoder = Autoencoder(WanVAE(TWO_LEVELS)).requires_grad_(False)
    randomize(autoencoder, std=0.2)
    pixels = toy_clips()
    noise = torch.randn(latent_shape(pixels, TWO_LEVELS))
    reconstruction, mean, log_variance = autoencoder(pixels, noise)
    z = mean + log_variance.exp().sqrt() * noise
    torch.testing.assert_close(reconstruction, autoencoder.vae.decode_unnormalized(z), atol=1e-4, rtol=1e-4)


def test_bad_clips_are_refused() -> None:
    vae = WanVAE(TWO_LEVELS)
    with pytest.raises(InputError, match="4 video frames"):
        vae.encode_distribution(torch.zeros(1, 4, 3, 4, 4))


# --- gradients and learning -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TWO_LEVELS, FOUR_LEVELS])
def test_gradient_flows_to_every_parameter(config: VAEConfig) -> None:
    autoencoder = Autoencoder(WanVAE(config))
    randomize(autoencoder, std=0.2)
    pixels = toy_clips()
    outputs = autoencoder(pixels, torch.randn(latent_shape(pixels, config)))
    loss, _ = vae_loss(pixels, *outputs, VAELossConfig())
    loss.backward()
    for name, parameter in autoencoder.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_learns_a_toy_clip() -> None:
    autoencoder = Autoencoder(WanVAE(TWO_LEVELS))
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=3e-3)
    pixels, config = toy_clips(), VAELossConfig(foreground_weight=5.0, foreground_margin_px=0)
    losses = []
    for _ in range(100):
        noise = torch.randn(latent_shape(pixels, TWO_LEVELS))
        loss, _ = vae_loss(pixels, *autoencoder(pixels, noise), config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    _, plain = vae_loss(pixels, torch.full_like(pixels, -0.5), *torch.zeros(2, 1), config)
    assert sum(losses[-10:]) / 10 < 0.6 * plain["reconstruction"]  # the squares are seen, not the background alone


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_loss_of_known_errors() -> None:
    pixels = toy_clips()
    mean, log_variance = torch.full((2, 3, 4, 8, 12), 0.6), torch.full((2, 3, 4, 8, 12), math.log(0.25))
    config = VAELossConfig(kl_weight=0.5)
    loss, metrics = vae_loss(pixels, pixels + 0.1, mean, log_variance, config)
    kl = 0.5 * (0.36 + 0.25 - 1 - math.log(0.25))
    assert metrics["reconstruction"].item() == pytest.approx(0.11, rel=1e-5)
    assert metrics["psnr_db"].item() == pytest.approx(10 * math.log10(4 / 0.01), rel=1e-5)
    assert metrics["kl"].item() == pytest.approx(kl, rel=1e-5)
    assert loss.item() == pytest.approx(0.11 + 0.5 * kl, rel=1e-5)


def test_kl_is_that_of_torch_and_zero_for_the_prior() -> None:
    mean, log_variance = torch.randn(1, 2, 4, 2, 3), torch.randn(1, 2, 4, 2, 3)
    pixels = toy_clips(1)
    posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0, 1)).mean()
    _, metrics = vae_loss(pixels, pixels, mean, log_variance, VAELossConfig())
    torch.testing.assert_close(metrics["kl"], expected)
    _, metrics = vae_loss(pixels, pixels, torch.zeros_like(mean), torch.zeros_like(mean), VAELossConfig())
    assert metrics["kl"] == 0


def test_foreground_counts_more() -> None:
    pixels = toy_clips()
    is_square = (pixels[:, :, :1] > 0).expand(-1, -1, 1, -1, -1)
    assert torch.equal(pixel_weights(pixels, VAELossConfig()), torch.ones(2, 5, 1, 16, 24))
    weights = pixel_weights(pixels, VAELossConfig(foreground_weight=7, foreground_margin_px=0))  # whole numbers too
    torch.testing.assert_close(weights.mean(dim=(1, 2, 3, 4)), torch.ones(2))
    square, background = weights[is_square], weights[~is_square]
    torch.testing.assert_close(square, 7 * background[0].expand_as(square))
    torch.testing.assert_close(background, background[0].expand_as(background))
    with_margin = pixel_weights(pixels, VAELossConfig(foreground_weight=7, foreground_margin_px=2))
    counts_more = (with_margin > with_margin.mean()).squeeze(2)
    near = torch.nn.functional.max_pool2d(is_square.squeeze(2).float(), 5, stride=1, padding=2) > 0
    assert torch.equal(counts_more, near)


@pytest.mark.parametrize(("name", "value"), [("kl_weight", -1e-6), ("kl_weight", math.nan), ("foreground_weight", 0.5)])
def test_bad_weights_are_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{name} is {value}"):
        VAELossConfig(**{name: value})


# --- statistics of latents --------------------------------------------------------------------------------------------


def test_statistics_normalize_the_draws() -> None:
    vae = WanVAE(TWO_LEVELS).requires_grad_(False)
    randomize(vae, std=0.3)
    batches = [torch.rand(batch, 5, 3, 16, 24) * 2 - 1 for batch in (1, 3)]
    config = with_latent_statistics(vae, iter(batches))
    normalized = WanVAE(config).requires_grad_(False)
    normalized.load_state_dict(vae.state_dict())
    latents = torch.cat([normalized.encode(pixels) for pixels in batches])
    variances = [vae.encode_distribution(pixels)[1].exp() for pixels in batches]
    noise_variance = torch.cat(variances) / normalized.latents_std.view(-1, 1, 1).square()
    axes = (0, 1, 3, 4)
    torch.testing.assert_close(latents.mean(dim=axes), torch.zeros(4), atol=1e-4, rtol=0)
    total = latents.var(dim=axes, correction=0) + noise_variance.mean(dim=axes)
    torch.testing.assert_close(total, torch.ones(4), atol=1e-4, rtol=0)
    assert (latents.std(dim=axes) > 0.01).all()  # else the means were not seen

    pixels = batches[0]
    torch.testing.assert_close(normalized.decode(normalized.encode(pixels)), vae.decode(vae.encode(pixels)))


def test_a_channel_without_content_is_not_amplified() -> None:
    vae = WanVAE(TWO_LEVELS).requires_grad_(False)
    randomize(vae, std=0.3)
    for channel in (0, TWO_LEVELS.z_dim):  # its mean and its log-variance: exactly the prior
        vae.conv1.weight[channel] = 0
        vae.conv1.bias[channel] = 0
    config = with_latent_statistics(vae, [toy_clips()])
    assert config.latents_mean[0] == 0
    assert config.latents_std[0] == 1
