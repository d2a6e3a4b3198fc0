"""The KL autoencoder of Stable Diffusion v1.5: images to latents (for segmentation) and back (for drawing).

The paper calls it VQGAN (section 3.2); Stable Diffusion v1.5 ships a KL autoencoder without a codebook.
Attribute names are those of the official diffusers folder `vae/`, so its weights load strictly. Equal to
diffusers' `AutoencoderKL` (tests/test_vae.py), whose encoder and decoder come from CompVis
`ldm/modules/diffusionmodules/model.py`.

`encode` returns the posterior mean and never samples: dense prediction needs a deterministic latent.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kernels import norm_silu, normed, own_type, wide_attention

EPS = 1e-6  # of every GroupNorm here (CompVis model.py, `Normalize`), not torch's 1e-5
LOGVAR_RANGE = (-30.0, 20.0)  # the clamp of CompVis ldm/modules/distributions/distributions.py


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the autoencoder; the default is Stable Diffusion v1.5."""

    channels: tuple[int, ...] = (128, 256, 512, 512)  # per level, finest first
    layers: int = 2  # residual blocks per encoder level; the decoder has one more
    latent_channels: int = 4
    groups: int = 32
    scale: float = 0.18215  # gives latents unit variance (v1-inference.yaml, `scale_factor`)

    @classmethod
    def tiny(cls) -> "VAEConfig":
        """A miniature for 128x128 images."""
        # At initialisation a scale of 6 gives latents of about unit variance; with 0.18215 they would be as
        # small as the "minor noise".
        return cls(channels=(16, 32, 64, 64), layers=1, groups=8, scale=6.0)


class VAE(nn.Module):
    """Images `(B, 3, H, W)` in [-1, 1] <-> latents `(B, 4, h, w)` of about unit variance."""

    def __init__(self, config: VAEConfig = VAEConfig()):
        super().__init__()
        self.config = config
        self.stride = 2 ** (len(config.channels) - 1)  # image pixels per latent pixel: 8
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def encode(self, image: Tensor) -> Tensor:
        """Return the scaled posterior mean `(B, 4, h, w)` of `(B, 3, H, W)`, H and W multiples of 8."""
        mean, _ = self.moments(image)
        return mean * self.config.scale

    def decode(self, latent: Tensor) -> Tensor:
        """Decode latents `(B, 4, h, w)` of `encode` to images `(B, 3, H, W)`, about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(latent / self.config.scale))

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the unscaled posterior, `(B, 4, h, w)` each."""
        H, W = image.shape[-2:]
        assert H % self.stride == 0 and W % self.stride == 0, (
            f"the image is {H}x{W}: pad both sides to a multiple of {self.stride}"
        )
        weight = self.quant_conv.weight
        with own_type(weight):
            moments = self.quant_conv(self.encoder(image.to(weight.dtype)))  # (B, 8, h, w)
        mean, logvar = moments.chunk(2, dim=1)  # (B, 4, h, w) each
        return mean, logvar.clamp(*LOGVAR_RANGE)


class Encoder(nn.Module):
    """Images `(B, 3, H, W)` -> `(B, 8, h, w)`, the moments before their 1x1 convolution."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = (config.channels[0], *config.channels)
        last = len(config.channels) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(widths[i], widths[i + 1], config.layers, config.groups, downsample=i < last)
            for i in range(last + 1)
        )
        self.mid_block = Mid(widths[-1], config.groups)
        self.conv_norm_out = nn.GroupNorm(config.groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv_in(image)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(norm_silu(self.conv_norm_out, x))


class Decoder(nn.Module):
    """Unscaled latents `(B, 4, h, w)` -> images `(B, 3, H, W)`; one more block per level than the encoder."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = (config.channels[-1], *reversed(config.channels))
        last = len(config.channels) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Mid(widths[0], config.groups)
        self.up_blocks = nn.ModuleList(
            Level(widths[i], widths[i + 1], config.layers + 1, config.groups, upsample=i < last)
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


class Level(nn.Module):
    """The residual blocks of one resolution, then down- or upsampling (except in the last level)."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        layers: int,
        groups: int,
        downsample: bool = False,
        upsample: bool = False,
    ):
        super().__init__()
        self.resnets = resnets(in_channels, channels, layers, groups)
        self.downsamplers = nn.Sequential(*[Downsample(channels)] if downsample else [])
        self.upsamplers = nn.Sequential(*[Upsample(channels)] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        return self.upsamplers(self.downsamplers(self.resnets(x)))


class Mid(nn.Module):
    """The coarsest level: residual block, self-attention over all pixels, residual block."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = resnets(channels, channels, 2, groups)
        self.attentions = nn.ModuleList([Attention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


def resnets(in_channels: int, channels: int, layers: int, groups: int) -> nn.Sequential:
    """A sequence of `layers` residual blocks; the first one changes the width."""
    return nn.Sequential(
        *(ResnetBlock(channels if i else in_channels, channels, groups) for i in range(layers))
    )


class ResnetBlock(nn.Module):
    """Twice (norm, SiLU, 3x3 convolution); residual."""

    def __init__(self, in_channels: int, channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=EPS)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels, eps=EPS)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, channels, 1) if in_channels != channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = norm_silu(self.norm1, x)  # reusing `h` frees the previous activation
        h = self.conv1(h)
        h = norm_silu(self.norm2, h)
        h = self.conv2(h)
        return h.add_(self.conv_shortcut(x))


class Attention(nn.Module):
    """Single-head self-attention over the h*w pixels; residual."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(normed(self.group_norm, x), "B C h w -> B (h w) 1 C")  # one head of width C
        y = self.to_out(wide_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)))
        return rearrange(y, "B (h w) 1 C -> B C h w", h=x.shape[2]) + x


class Downsample(nn.Module):
    """Halve the size. As CompVis, pads on the right and below only: symmetric padding shifts the latent."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the size: nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
