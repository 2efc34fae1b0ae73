"""The Wan2.1 video VAE: 8x smaller in height and width, 4x in time, causal in time, streamed with an explicit cache.

A clip is processed in chunks: the first latent stands for 1 video frame, every later one for 4. Each causal convolution
keeps the last frames of its input for the next chunk; these frames are the only state. They travel in a `StreamCache`
that the caller owns, so a clip of any length takes constant memory and has no seams, and since a chunk is the same
computation whether it comes alone or inside a longer clip, pieces of any size equal the whole exactly. Training takes
a whole clip as one first chunk: the same values up to rounding, in one pass without a loop.

Shapes inside: x [B, C, T, H, W], stored channels-last. T counts the frames of one chunk at the current level: for one
latent 1 in the first chunk; later 1, 2 or 4 on the way between latent and video. Module names are those of the original
checkpoint.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longlive.errors import InputError

# Per-channel statistics of Wan2.1's latents.
WAN_LATENTS_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
WAN_LATENTS_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of a `WanVAE`; the defaults are Wan2.1.

    Level i has `base_dim * dim_mult[i]` channels; between level i and i + 1 height and width are halved, and time too
    where `temporal_downsample[i]`. Latents are normalised with `latents_mean` and `latents_std`, one value per channel.
    Raises InputError (a ValueError) for sizes that do not fit together.
    """

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = WAN_LATENTS_MEAN
    latents_std: tuple[float, ...] = WAN_LATENTS_STD

    def __post_init__(self) -> None:
        if min(self.base_dim, self.z_dim, self.num_res_blocks, len(self.dim_mult), *self.dim_mult) < 1:
            raise InputError(f"VAE sizes must be at least 1: {self}")
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise InputError(
                f"temporal_downsample has {len(self.temporal_downsample)} values, "
                f"accepted is one less than dim_mult: {len(self.dim_mult) - 1}"
            )
        for name, values in (("latents_mean", self.latents_mean), ("latents_std", self.latents_std)):
            if len(values) != self.z_dim:
                raise InputError(f"{name} has {len(values)} values, accepted is one per latent channel: {self.z_dim}")
        if min(self.latents_std) <= 0:
            raise InputError(f"latents_std must be positive, not {min(self.latents_std)}")
        if any(dim % 2 for dim in self.dims[1:]):  # the decoder halves the channels where it doubles the resolution
            raise InputError(f"base_dim * dim_mult must be even after the first level, not {self.dims}")

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels per level, from pixels to latents."""
        return tuple(self.base_dim * mult for mult in self.dim_mult)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent in height and in width."""
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_factor(self) -> int:
        """Video frames per latent frame after the first."""
        return 2 ** sum(self.temporal_downsample)

    def num_video_frames(self, num_frames: int) -> int:
        """Video frames of the first `num_frames` latent ones: the first one is one, every other several."""
        return max(0, 1 + self.temporal_factor * (num_frames - 1))

    def num_latent_frames(self, num_video_frames: int) -> int:
        """Latent frames that hold the first `num_video_frames` video frames."""
        return 1 + -(-(num_video_frames - 1) // self.temporal_factor)


@dataclass
class StreamCache:
    """What one encode or one decode stream carries from chunk to chunk; empty before the first.

    features: per causal convolution, in the order of the pass, the last frames of its input [B, C, 2 or 1, H, W].
    """

    features: list[Tensor] = field(default_factory=list)

    def clone(self) -> "StreamCache":
        """An independent snapshot. A pass replaces tensors and never writes into them, so references are enough."""
        return StreamCache(list(self.features))


class _Chunk:
    """The causal state of one pass: hands out the frames kept by the last pass, collects those for the next."""

    def __init__(self, past: list[Tensor]) -> None:
        self.past = past
        self.kept: list[Tensor] = []

    @property
    def is_first(self) -> bool:
        return not self.past

    def prepend(self, x: Tensor, num_frames: int) -> Tensor:
        """x [B, C, T, H, W] with the `num_frames` frames before it in front (zeros before the first chunk)."""
        if self.is_first:
            x = F.pad(x, (0, 0, 0, 0, num_frames, 0))
        else:
            x = torch.cat([self.past[len(self.kept)], x], dim=2)
        self.keep(x[:, :, -num_frames:])
        return x

    def keep(self, frames: Tensor) -> None:
        """Keeps a copy, as a view would hold the whole chunk in memory; in one layout, whatever made the frames."""
        self.kept.append(frames.clone(memory_format=torch.channels_last_3d))


def per_frame(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Applies an image function [N, C, H, W] -> [N, C', H', W'] to the frames of x (views: x is channels-last)."""
    frames = function(x.transpose(1, 2).flatten(0, 1))
    return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class Conv3d(nn.Conv3d):
    """3-D convolution without padding in time, on a CPU computed as a 2-D one."""

    def forward(self, x: Tensor) -> Tensor:
        return self.by_images(x) if x.device.type == "cpu" else super().forward(x)

    def by_images(self, x: Tensor) -> Tensor:
        """The same result with time in the channels: PyTorch runs small 3-D convolutions on a CPU ten times slower."""
        num_taps, stride = self.kernel_size[0], self.stride[0]
        last = x.shape[2] - num_taps
        x = torch.cat([x[:, :, tap : tap + last + 1 : stride] for tap in range(num_taps)], dim=1)
        weight = self.weight.transpose(1, 2).flatten(1, 2)  # [C', taps * C, kernel, kernel]
        conv = partial(F.conv2d, weight=weight, bias=self.bias, stride=self.stride[1:], padding=self.padding[1:])
        return per_frame(conv, x).contiguous(memory_format=torch.channels_last_3d)


class CausalConv3d(Conv3d):
    """3x3x3 convolution whose output at a frame sees that frame and the two before it."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim, out_dim, kernel_size=3, padding=(0, 1, 1))

    def forward(self, x: Tensor, chunk: _Chunk) -> Tensor:  # type: ignore[override]
        padded = chunk.prepend(x, 2)
        if padded.shape[2] > 3 or not chunk.is_first:
            return super().forward(padded)
        # A picture: the frames before it are zeros, and of the taps only the newest counts.
        newest = partial(F.conv2d, weight=self.weight[:, :, -1], bias=self.bias, padding=self.padding[1:])
        return per_frame(newest, x).contiguous(memory_format=torch.channels_last_3d)


class RMSNorm(nn.Module):
    """x / |x| * sqrt(dim) * gamma over channels (dim 1), inside in float32; `num_axes` axes follow the channels."""

    def __init__(self, dim: int, num_axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * num_axes))

    def forward(self, x: Tensor) -> Tensor:
        # The channels are last in memory. The epsilon only keeps the norm of zeros finite.
        weight = self.gamma.flatten()
        return F.rms_norm(x.movedim(1, -1), weight.shape, weight, eps=1e-24).movedim(-1, 1)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1x1 convolution on the skip where the width changes."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.residual = nn.ModuleList(
            [
                RMSNorm(in_dim, 3),
                nn.SiLU(),
                CausalConv3d(in_dim, out_dim),
                RMSNorm(out_dim, 3),
                nn.SiLU(),
                nn.Identity(),  # the place of a dropout: the checkpoint's names count it
                CausalConv3d(out_dim, out_dim),
            ]
        )
        self.shortcut = Conv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor, chunk: _Chunk) -> Tensor:
        y = x
        for layer in self.residual:
            y = layer(y, chunk) if isinstance(layer, CausalConv3d) else layer(y)
        return self.shortcut(x) + y


class AttentionBlock(nn.Module):
    """x + proj(attention(norm(x))): single head, over the positions of each frame alone."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.proj.weight)  # training starts without attention

    def forward(self, x: Tensor) -> Tensor:
        return x + per_frame(self._attend, x)

    def _attend(self, frames: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).unsqueeze(1)  # [N, 1 head, H*W, 3C]
        attended = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))
        return self.proj(attended.squeeze(1).transpose(1, 2).unflatten(2, frames.shape[2:]))


class Downsample(nn.Module):
    """Halves height and width and, if `temporal`, the frames; the clip's first frame passes through time unchanged."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, chunk: _Chunk) -> Tensor:
        x = per_frame(self.resample, x)
        if self.time_conv is None:
            return x
        if not chunk.is_first:
            return self.time_conv(chunk.prepend(x, 1))  # T + 1 frames -> T / 2
        chunk.keep(x[:, :, -1:])
        return x if x.shape[2] == 1 else torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)


class Upsample(nn.Module):
    """Doubles height and width, halves the channels and, if `temporal`, doubles the frames.

    The clip's first frame is not doubled, and the time convolution of the later ones sees zeros in its place.
    """

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest-exact"), nn.Conv2d(dim, dim // 2, 3, padding=1)
        )
        self.time_conv = Conv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, chunk: _Chunk) -> Tensor:
        if self.time_conv is not None:
            if chunk.is_first:
                first, later = x[:, :, :1], chunk.prepend(x[:, :, 1:], 2)
                x = first if x.shape[2] == 1 else torch.cat([first, self._interleave(self.time_conv(later))], dim=2)
            else:
                x = self._interleave(self.time_conv(chunk.prepend(x, 2)))
        return per_frame(self.resample, x)

    @staticmethod
    def _interleave(x: Tensor) -> Tensor:
        """[B, 2C, T, H, W] -> [B, C, 2T, H, W], channels-last: the two halves become neighbouring frames."""
        x = x.unflatten(1, (2, -1)).permute(0, 3, 1, 4, 5, 2).flatten(1, 2)
        return x.permute(0, 4, 1, 2, 3)


class _Coder(nn.Module):
    """The ends that encoder and decoder share: conv1, the middle (residual, attention, residual) and the head."""

    def __init__(self, in_dim: int, first_dim: int, middle_dim: int, last_dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(in_dim, first_dim)
        self.middle = nn.ModuleList(
            [ResidualBlock(middle_dim, middle_dim), AttentionBlock(middle_dim), ResidualBlock(middle_dim, middle_dim)]
        )
        self.head = nn.ModuleList([RMSNorm(last_dim, 3), nn.SiLU(), CausalConv3d(last_dim, out_dim)])

    def _middle(self, x: Tensor, chunk: _Chunk) -> Tensor:
        before, attention, after = self.middle
        return after(attention(before(x, chunk)), chunk)

    def _head(self, x: Tensor, chunk: _Chunk) -> Tensor:
        norm, activation, conv = self.head
        return conv(activation(norm(x)), chunk)


class Encoder(_Coder):
    """One chunk of pixels [B, 3, 1 or temporal_factor, H, W] -> [B, 2 * z_dim, 1, h, w] and the state for the next.

    The first chunk may have 1 + temporal_factor * k frames, which give 1 + k latents.
    """

    def __init__(self, config: VAEConfig) -> None:
        dims = config.dims
        super().__init__(3, dims[0], dims[-1], dims[-1], 2 * config.z_dim)
        self.downsamples = nn.ModuleList()
        for level, (in_dim, out_dim) in enumerate(zip((dims[0], *dims), dims, strict=False)):
            self.downsamples.append(ResidualBlock(in_dim, out_dim))
            self.downsamples.extend(ResidualBlock(out_dim, out_dim) for _ in range(config.num_res_blocks - 1))
            if level < len(dims) - 1:
                self.downsamples.append(Downsample(out_dim, config.temporal_downsample[level]))

    def forward(self, x: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        chunk = _Chunk(past)
        x = self.conv1(x, chunk)
        for block in self.downsamples:
            x = block(x, chunk)
        return self._head(self._middle(x, chunk), chunk), chunk.kept


class Decoder(_Coder):
    """Latents [B, z_dim, k, h, w] -> pixels [B, 3, temporal_factor * k, H, W] and the state for the next chunk.

    The first latent of the first chunk gives 1 frame.
    """

    def __init__(self, config: VAEConfig) -> None:
        dims = config.dims
        super().__init__(config.z_dim, dims[-1], dims[-1], dims[0], 3)
        self.upsamples = nn.ModuleList()
        in_dim = dims[-1]
        for level in reversed(range(len(dims))):
            out_dim = dims[level]
            self.upsamples.append(ResidualBlock(in_dim, out_dim))
            self.upsamples.extend(ResidualBlock(out_dim, out_dim) for _ in range(config.num_res_blocks))
            if level > 0:
                self.upsamples.append(Upsample(out_dim, config.temporal_downsample[level - 1]))
            in_dim = out_dim // 2

    def forward(self, x: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        chunk = _Chunk(past)
        x = self._middle(self.conv1(x, chunk), chunk)
        for block in self.upsamples:
            x = block(x, chunk)
        return self._head(x, chunk), chunk.kept

    def last_frame(self, x: Tensor) -> Tensor:
        """The last frame [B, 3, 1, H, W] of a whole clip of latents [B, z_dim, k, h, w].

        Every layer is given only as many frames as the last one depends on. What a cut makes of its first frames,
        which lack those before them, does not reach the last.
        """
        num_frames = [3]  # of the head
        for block in reversed(self.upsamples):
            if isinstance(block, ResidualBlock):
                num_frames.append(num_frames[-1] + 4)
            elif isinstance(block, Upsample) and block.time_conv is not None:
                num_frames.append(-(-num_frames[-1] // 2) + 3)  # the first is not doubled, two more see zeros
            else:
                num_frames.append(num_frames[-1])
        chunk = _Chunk([])
        x = self._middle(self.conv1(x, chunk), chunk)
        for block, num in zip(self.upsamples, reversed(num_frames), strict=False):
            x = block(x[:, :, -num:], chunk)
        return self._head(x[:, :, -num_frames[0] :], chunk)[:, :, -1:]


class WanVAE(nn.Module):
    """Encoder and decoder between pixels [B, F, 3, H, W] in [-1, 1] and normalised latents [B, f, z_dim, H/8, W/8].

    F = 1 + 4 (f - 1) video frames (the factors 8 and 4 are `config.spatial_factor` and `config.temporal_factor`).
    Inputs are cast to the dtype of the parameters and outputs have it. Weights load from the original
    `Wan2.1_VAE.pth` as they are. For speed on a GPU: bfloat16, `use_channels_last()` and `vae.decoder.compile()` (two
    graphs: a stream's first chunk and all others).
    """

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = Conv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)
        # Constants of the config, not of the checkpoint; on the CPU even where the parameters are made on "meta".
        for name, values in (("latents_mean", config.latents_mean), ("latents_std", config.latents_std)):
            buffer = torch.tensor(values, dtype=torch.float32, device="cpu").view(-1, 1, 1, 1)
            self.register_buffer(name, buffer, persistent=False)

    def use_channels_last(self) -> Self:
        """Stores the weights of the convolutions channels-last, as the activations are: 8 % faster on a GPU.

        Call it after loading. Values and names stay; a file format may want the weights `.contiguous()` again.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                layout = torch.channels_last if isinstance(module, nn.Conv2d) else torch.channels_last_3d
                module.weight.data = module.weight.data.contiguous(memory_format=layout)
        return self

    def new_cache(self) -> StreamCache:
        """The state before a stream's first chunk. A stream either encodes or decodes, at one batch and frame size."""
        return StreamCache()

    def encode(self, pixels: Tensor, cache: StreamCache | None = None) -> Tensor:
        """Latents of pixels: the posterior mean, normalised as `(mu - mean) / std`.

        Args:
            pixels: [B, F, 3, H, W] in [-1, 1]; H and W multiples of `spatial_factor`.
            cache: the stream to continue, updated; without it `pixels` is a whole clip. A stream or clip starts with
                F = 1 + 4k video frames and goes on with F = 4k, k latents each time.

        Returns:
            [B, f, z_dim, H/8, W/8] with f = 1 + k at the start and f = k later.

        Raises:
            InputError: another number of frames or channels, or a size that is no multiple of `spatial_factor`.
        """
        cache = self.new_cache() if cache is None else cache
        is_start = not cache.features
        self._check_pixels(pixels, is_start)
        step = self.config.temporal_factor
        later_chunks = tuple(range(1 if is_start else step, pixels.shape[1], step))
        chunks = pixels.tensor_split(later_chunks, dim=1)
        return torch.cat([self._encode_chunk(chunk, cache) for chunk in chunks], dim=1)

    def decode(self, latents: Tensor, cache: StreamCache | None = None) -> Tensor:
        """Pixels of normalised latents, NOT clamped: what leaves [-1, 1] is for the caller to clamp.

        Args:
            latents: [B, f, z_dim, h, w], f >= 1.
            cache: the stream to continue, updated; without it `latents` is a whole clip.

        Returns:
            [B, F, 3, 8h, 8w]: 1 video frame for the first latent of a stream or clip, 4 for every other.

        Raises:
            InputError: not 5 axes, no frame, or another number of channels than `z_dim`.
        """
        self._check_latents(latents)
        cache = self.new_cache() if cache is None else cache
        return torch.cat([self._decode_chunk(chunk, cache) for chunk in latents.split(1, dim=1)], dim=1)

    def decode_last(self, latents: Tensor) -> Tensor:
        """The last video frame [B, 1, 3, 8h, 8w] of a whole clip [B, f, z_dim, h, w]: that of `decode`, up to rounding,
        without most of the others. Raises as `decode` does."""
        self._check_latents(latents)
        return self.decoder.last_frame(self._features(latents)).transpose(1, 2)

    def encode_distribution(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior of a whole clip, not normalised; in one pass, for training.

        Args:
            pixels: [B, F, 3, H, W] in [-1, 1] with F = 1 + 4k; H and W multiples of `spatial_factor`.

        Returns:
            Two [B, 1 + k, z_dim, H/8, W/8]. Memory grows with the clip.

        Raises:
            InputError: as `encode`.
        """
        self._check_pixels(pixels, is_start=True)
        features, _state = self.encoder(self._channels_first(pixels), [])
        mean, log_variance = self.conv1(features).transpose(1, 2).chunk(2, dim=2)
        return mean, log_variance

    def decode_unnormalized(self, z: Tensor) -> Tensor:
        """Pixels [B, 1 + 4k, 3, 8h, 8w], not clamped, of a whole clip of draws z [B, 1 + k, z_dim, h, w] from
        `encode_distribution`; in one pass, for training."""
        pixels, _state = self.decoder(self.conv2(self._channels_first(z)), [])
        return pixels.transpose(1, 2)

    def normalized(self, z: Tensor) -> Tensor:
        """Latents of values [B, f, z_dim, h, w] such as the means of `encode_distribution`."""
        return ((z.transpose(1, 2) - self.latents_mean) / self.latents_std).transpose(1, 2)

    def _encode_chunk(self, pixels: Tensor, cache: StreamCache) -> Tensor:
        features, cache.features = self.encoder(self._channels_first(pixels), cache.features)
        mu, _log_variance = self.conv1(features).chunk(2, dim=1)
        return self.normalized(mu.transpose(1, 2))

    def _decode_chunk(self, latents: Tensor, cache: StreamCache) -> Tensor:
        pixels, cache.features = self.decoder(self._features(latents), cache.features)
        return pixels.transpose(1, 2)

    def _features(self, latents: Tensor) -> Tensor:
        """What the decoder is given of normalised latents."""
        return self.conv2(self._channels_first(latents) * self.latents_std + self.latents_mean)

    def _check_latents(self, latents: Tensor) -> None:
        if latents.ndim != 5 or latents.shape[1] < 1 or latents.shape[2] != self.config.z_dim:
            raise InputError(f"latents are {tuple(latents.shape)}, accepted is [B, f, {self.config.z_dim}, h, w]")

    def _channels_first(self, x: Tensor) -> Tensor:
        """[B, T, C, H, W] -> [B, C, T, H, W] in the parameters' dtype; one memory layout whatever the caller's."""
        return x.transpose(1, 2).to(self.conv1.weight.dtype).clone(memory_format=torch.channels_last_3d)

    def _check_pixels(self, pixels: Tensor, is_start: bool) -> None:
        factor, step = self.config.spatial_factor, self.config.temporal_factor
        if pixels.ndim != 5 or pixels.shape[2] != 3:
            raise InputError(f"pixels are {tuple(pixels.shape)}, accepted is [B, F, 3, H, W]")
        height, width = pixels.shape[3:]
        if min(height, width) < factor or height % factor or width % factor:
            raise InputError(f"frames are {height}x{width} px, accepted are multiples of {factor}")
        num_first = 1 if is_start else step
        nearest = num_first + step * max((pixels.shape[1] - num_first + step // 2) // step, 0)
        if pixels.shape[1] != nearest:
            accepted = f"1 + {step}k at the start" if is_start else f"{step}k after the start"
            raise InputError(f"{pixels.shape[1]} video frames to encode, accepted are {accepted}; nearest: {nearest}")
