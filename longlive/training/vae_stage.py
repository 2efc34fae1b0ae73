"""Training a video VAE for small worlds: network, loss and the statistics that normalise its latents.

Plain functions; the posterior's noise is an argument. Pixels are [B, V, 3, H, W] in [-1, 1], V = 1 + 4k video frames;
latents are [B, f, z_dim, h, w], f = 1 + k.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longlive.data.clips import PixelSource
from longlive.data.order import Order
from longlive.errors import InputError
from longlive.models.vae import AttentionBlock, Downsample, ResidualBlock, Upsample, VAEConfig, WanVAE
from longlive.training.clock import Clock
from longlive.training.draw import Draw, Pictures
from longlive.training.stage import Loss, Stage

# Outside this range a posterior is a point or noise alone; its exponential would leave float32.
LOG_VARIANCE_RANGE = (-30.0, 20.0)
FIRST_LOG_VARIANCE = -6.0


@torch.no_grad()
def begin_as_images(vae: WanVAE) -> None:
    """Draw the weights that training begins with: each frame by itself, straight through, almost without noise.

    Convolutions keep the variance and see the newest frame alone, residual branches add nothing, and where frames are
    joined or doubled they are just passed on, as a clip's first frame always is: what is learnt of one frame holds for
    all. From weights drawn as usual a small VAE takes several times as long.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.zeros_(module.weight)
            newest = module.weight[:, :, -1] if module.weight.ndim == 5 else module.weight
            nn.init.normal_(newest, std=newest[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(cast(nn.Conv3d, module.residual[-1]).weight)
        elif isinstance(module, AttentionBlock):
            nn.init.zeros_(module.proj.weight)
        elif isinstance(module, Downsample | Upsample) and module.time_conv is not None:
            dim = module.time_conv.in_channels
            copies = torch.eye(dim).repeat(module.time_conv.out_channels // dim, 1)
            nn.init.zeros_(module.time_conv.weight)
            module.time_conv.weight[:, :, -1, 0, 0] = copies
    z_dim = vae.config.z_dim
    vae.conv1.weight[z_dim:] *= 0.1
    assert vae.conv1.bias is not None
    vae.conv1.bias[z_dim:] = FIRST_LOG_VARIANCE


class Autoencoder(nn.Module):
    """A VAE whose training pass, encode, draw and decode, is one `forward`: FSDP gathers the weights at that call."""

    def __init__(self, vae: WanVAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The reconstruction of pixels [B, V, 3, H, W], and the mean and log-variance of the posterior.

        noise: standard normal, of `latent_shape`. Raises InputError for pixels that `WanVAE.encode` does not accept.
        """
        mean, log_variance = self.vae.encode_distribution(pixels)
        log_variance = log_variance.clamp(*LOG_VARIANCE_RANGE)
        z = mean + (0.5 * log_variance).exp() * noise.to(mean.dtype)
        # FSDP wants no views: their backward hooks could be lost.
        return self.vae.decode_unnormalized(z).clone(), mean.clone(), log_variance


def latent_shape(pixels: Tensor, config: VAEConfig) -> tuple[int, int, int, int, int]:
    """[B, f, z_dim, h, w] of the latents of pixels [B, V, 3, H, W]."""
    batch, num_video_frames, _channels, height, width = pixels.shape
    factor = config.spatial_factor
    return batch, config.num_latent_frames(num_video_frames), config.z_dim, height // factor, width // factor


@dataclass(frozen=True)
class VAELossConfig:
    """Weights of the loss: mean |error| + mean error² over pixels + `kl_weight` times the mean KL per latent value.

    |error| keeps edges sharp; error² sees the small objects that a median would drop. In worlds of small objects on
    a plain background `foreground_weight` makes pixels count more that differ by more than `foreground_threshold` (of
    the range 2) from the median colour of their frame, or are within `foreground_margin_px` of such: an outline has two
    sides. Raises InputError for values out of range.
    """

    kl_weight: float = 1e-4
    foreground_weight: float = 1.0
    foreground_threshold: float = 0.1
    foreground_margin_px: int = 2

    def __post_init__(self) -> None:
        least_values = {"kl_weight": 0, "foreground_weight": 1, "foreground_threshold": 0, "foreground_margin_px": 0}
        for name, least in least_values.items():
            if not getattr(self, name) >= least:
                raise InputError(f"{name} is {getattr(self, name)}, accepted is a number of at least {least}")


def vae_loss(
    pixels: Tensor, reconstruction: Tensor, mean: Tensor, log_variance: Tensor, config: VAELossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of what `Autoencoder` returned, in float32, and its metrics.

    Metrics, detached: "reconstruction" (the weighted mean of |error| + error²), "psnr_db" of the unweighted, clamped
    pixels over the whole batch, "kl" in nats per latent value.
    """
    pixels, reconstruction = pixels.float(), reconstruction.float()
    mean, log_variance = mean.float(), log_variance.float()
    error = (reconstruction - pixels).abs()
    weights = pixel_weights(pixels, config)
    reconstruction_error = (weights * (error + error.square())).mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    with torch.no_grad():
        squared_error = (reconstruction.clamp(-1, 1) - pixels).square().mean()
        psnr_db = 10 * torch.log10(4 / squared_error)  # the range of the pixels is 2
    metrics = {"reconstruction": reconstruction_error.detach(), "psnr_db": psnr_db, "kl": kl.detach()}
    return reconstruction_error + config.kl_weight * kl, metrics


def pixel_weights(pixels: Tensor, config: VAELossConfig) -> Tensor:
    """[B, V, 1, H, W] with mean 1 over each clip: `foreground_weight` : 1 for foreground and background."""
    background = pixels.flatten(3).median(dim=3).values[..., None, None]
    is_foreground = ((pixels - background).abs().amax(dim=2) > config.foreground_threshold).to(pixels.dtype)
    margin = config.foreground_margin_px
    is_foreground = F.max_pool2d(is_foreground, 2 * margin + 1, stride=1, padding=margin).unsqueeze(2)
    weights = 1 + (config.foreground_weight - 1) * is_foreground
    return weights / weights.mean(dim=(1, 2, 3, 4), keepdim=True)


@torch.no_grad()
def with_latent_statistics(vae: WanVAE, batches: Iterable[Tensor]) -> VAEConfig:
    """The config of a trained VAE with the statistics of its latents over batches of pixels [B, V, 3, H, W].

    Per channel mean and standard deviation of draws from the posterior, so the variance is E[log_variance.exp()] +
    Var[mean]: a channel that carries nothing keeps deviation 1 and stays near 0 when encoded, where the deviation of
    its mean alone would amplify what is noise. `WanVAE(config)` with the same weights then normalises.
    """
    count = torch.zeros((), dtype=torch.float64)
    first, second = (torch.zeros(vae.config.z_dim, dtype=torch.float64) for _ in range(2))
    for pixels in batches:
        mean, log_variance = (tensor.double() for tensor in vae.encode_distribution(pixels))
        variance = log_variance.clamp(*LOG_VARIANCE_RANGE).exp()
        count += mean.numel() // mean.shape[2]
        first += mean.sum(dim=(0, 1, 3, 4)).cpu()
        second += (mean.square() + variance).sum(dim=(0, 1, 3, 4)).cpu()
    means = first / count
    deviations = (second / count - means.square()).sqrt()
    return replace(vae.config, latents_mean=tuple(means.tolist()), latents_std=tuple(deviations.tolist()))


class VAETraining(Stage):
    """A stage that trains the network "vae", an `Autoencoder` or what stands for one, on clips of pixels."""

    def __init__(
        self,
        autoencoder: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
        config: VAEConfig,
        clips: PixelSource,
        order: Order,
        loss_config: VAELossConfig,
        clock: Clock,
        pictures: Pictures,
    ) -> None:
        """pictures: most of what a frame needs is learnt from them."""
        self.autoencoder = autoencoder
        self.config = config
        self.clips = clips
        self.order = order
        self.loss_config = loss_config
        self.clock = clock
        self.pictures = pictures

    def due(self, step: int) -> tuple[str, ...]:
        return ("vae",)

    def loss(self, network: str, draw: Draw) -> Loss:
        with self.clock.part("data"):
            draw, is_pictures = self.pictures.choose(draw)
            pixels = self.clips.pixels([self.order[sample] for sample in draw.samples])
            pixels = (pixels[:, :1] if is_pictures else pixels).to(draw.device)
        noise = draw.of("posterior").normal(*latent_shape(pixels, self.config)[1:])
        with self.clock.part("forward"):
            reconstruction, mean, log_variance = self.autoencoder(pixels, noise)
            loss, metrics = vae_loss(pixels, reconstruction, mean, log_variance, self.loss_config)
        return Loss(loss, metrics, noise.shape[0] * noise.shape[1])
