"""The KL autoencoder of Stable Diffusion v1.5: pictures to latents (for the task) and back (for drawing).

The paper calls it VQGAN (section 3.2); the file that Stable Diffusion v1.5 ships is a KL autoencoder without
a codebook. Attribute names are those of the official diffusers folder `vae/`, so its weights load strictly.
Equal to diffusers' `AutoencoderKL` (tests/test_vae.py), whose encoder and decoder come from CompVis
`ldm/modules/diffusionmodules/model.py`.

This file does not sample the posterior: `encode` is deterministic, as dense prediction needs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kernels import norm_silu, wide_attention

EPS = 1e-6  # of every official GroupNorm here (CompVis model.py, `Normalize`); torch's 1e-5 is wrong
LOGVAR_RANGE = (-30.0, 20.0)  # the clamp of CompVis ldm/modules/distributions/distributions.py


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the autoencoder; the default is Stable Diffusion v1.5."""

    channels: tuple[int, ...] = (128, 256, 512, 512)  # per level, finest first
    layers: int = 2  # residual blocks per encoder level; the decoder has one more
    latent_channels: int = 4
    groups: int = 32
    scale: float = 0.18215  # the latent's variance is then about one (v1-inference.yaml, `scale_factor`)

    @classmethod
    def tiny(cls) -> "VAEConfig":
        """The miniature for 128x128 pictures."""
        # The scale: as it is initialised, its latents then have about unit variance; untrained, 0.18215 would
        # leave them as small as the "minor noise".
        return cls(channels=(16, 32, 64, 64), layers=1, groups=8, scale=6.0)


class VAE(nn.Module):
    """Pictures `(B, 3, H, W)` in [-1, 1] <-> latents `(B, 4, h, w)` with h, w = H/8, W/8 and about unit
    variance.
    """

    def __init__(self, config: VAEConfig = VAEConfig()):
        super().__init__()
        self.config = config
        self.stride = 2 ** (len(config.channels) - 1)  # image pixels per latent pixel: 8
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def encode(self, image: Tensor) -> Tensor:
        """The posterior mean, scaled: `(B, 3, H, W)` in [-1, 1] -> `(B, 4, h, w)`. H and W must be multiples
        of 8.
        """
        mean, _ = self.moments(image)
        return mean * self.config.scale

    def decode(self, latent: Tensor) -> Tensor:
        """`(B, 4, h, w)` as `encode` gives it -> image `(B, 3, H, W)`, about [-1, 1] and not clamped."""
        return self.decoder(self.post_quant_conv(latent / self.config.scale))

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the unscaled posterior, each `(B, 4, h, w)`; what training an autoencoder
        needs.
        """
        H, W = image.shape[-2:]
        assert H % self.stride == 0 and W % self.stride == 0, (
            f"the picture is {H}x{W}, but the autoencoder halves it {self.stride.bit_length() - 1} times: "
            f"pad both sides to a multiple of {self.stride}"
        )
        # (B, 8, h, w) -> 2 x (B, 4, h, w)
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)


class Encoder(nn.Module):
    """`(B, 3, H, W)` -> moments before their 1x1 convolution, `(B, 8, h, w)`."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = (config.channels[0], *config.channels)
        last = len(config.channels) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Down(widths[i], widths[i + 1], config.layers, config.groups, downsample=i < last)
            for i in range(last + 1)
        )
        self.mid_block = Mid(widths[-1], config.groups)
        self.conv_norm_out = nn.GroupNorm(config.groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        if image.dtype == torch.bfloat16:  # not float32, whose channels-last GroupNorm is inexact on a CPU
            image = image.contiguous(memory_format=torch.channels_last)
        x = self.conv_in(image)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(norm_silu(self.conv_norm_out, x))


class Decoder(nn.Module):
    """Unscaled latent `(B, 4, h, w)` -> image `(B, 3, H, W)`: the encoder's mirror, with one more block per
    level.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = (config.channels[-1], *reversed(config.channels))
        last = len(config.channels) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Mid(widths[0], config.groups)
        self.up_blocks = nn.ModuleList(
            Up(widths[i], widths[i + 1], config.layers + 1, config.groups, upsample=i < last)
            for i in range(last + 1)
        )
        self.conv_norm_out = nn.GroupNorm(config.groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        x = self.conv_in(latent)
        x = self.mid_block(x)
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(norm_silu(self.conv_norm_out, x))


class Down(nn.Module):
    """One encoder level: residual blocks, then half the size (except on the last level)."""

    def __init__(self, in_channels: int, channels: int, layers: int, groups: int, downsample: bool):
        super().__init__()
        self.resnets = resnets(in_channels, channels, layers, groups)
        self.downsamplers = nn.Sequential(*[Downsample(channels)] if downsample else [])

    def forward(self, x: Tensor) -> Tensor:
        return self.downsamplers(self.resnets(x))


class Up(nn.Module):
    """One decoder level: residual blocks, then twice the size (except on the last level)."""

    def __init__(self, in_channels: int, channels: int, layers: int, groups: int, upsample: bool):
        super().__init__()
        self.resnets = resnets(in_channels, channels, layers, groups)
        self.upsamplers = nn.Sequential(*[Upsample(channels)] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        return self.upsamplers(self.resnets(x))


class Mid(nn.Module):
    """The coarsest level: block, self-attention over all pixels, block."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = resnets(channels, channels, 2, groups)
        self.attentions = nn.ModuleList([Attention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


def resnets(in_channels: int, channels: int, layers: int, groups: int) -> nn.Sequential:
    """`layers` residual blocks in a row; the first one changes the width."""
    return nn.Sequential(
        *[ResnetBlock(channels if i else in_channels, channels, groups) for i in range(layers)]
    )


class ResnetBlock(nn.Module):
    """Two times (norm, SiLU, 3x3 convolution), added to the input."""

    def __init__(self, in_channels: int, channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=EPS)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels, eps=EPS)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, channels, 1) if in_channels != channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = norm_silu(self.norm1, x)  # rebinding h frees the last result
        h = self.conv1(h)
        h = norm_silu(self.norm2, h)
        h = self.conv2(h)
        return h.add_(self.conv_shortcut(x))


class Attention(nn.Module):
    """Single-head self-attention over the h*w pixels, added to the input."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.group_norm(x), "B C h w -> B (h w) 1 C")  # one head as wide as the map
        y = self.to_out(wide_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)))
        return rearrange(y, "B (h w) 1 C -> B C h w", h=x.shape[2]) + x


class Downsample(nn.Module):
    """Half the size. The padding is on the right and below only, as CompVis pads; a symmetric one shifts the
    latent.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size: nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
