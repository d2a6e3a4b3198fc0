"""The denoising UNet of Stable Diffusion v1.5: noise prediction and the four feature maps of the paper.

Attribute names are those of the official diffusers folder `unet/`, so its weights load strictly. Equal to
diffusers' `UNet2DConditionModel` (tests/test_unet.py), which is CompVis
`ldm/modules/diffusionmodules/openaimodel.py`.

Top to bottom: the UNet, one level of it, then its two kinds of block (residual and transformer) and their
parts.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import add_normed, attention, attention_maps, norm_silu, own_type
from kernels.linear import Linear, linear

TAP = 1  # maps come after the second block of an up level (VPD vpd/models.py, output_blocks 1, 4, 7)
MAX_CONTEXT = 1024  # tokens
TIMES = 1000  # steps of Stable Diffusion's noise schedule


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of the UNet; the default is Stable Diffusion v1.5."""

    # Per level, finest first; all levels but the last have attention.
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: int = 2  # blocks per level on the way down; one more on the way up
    heads: int = 8  # of every attention (`attention_head_dim` in the official config.json)
    context_width: int = 768
    latent_channels: int = 4
    groups: int = 32

    @classmethod
    def tiny(cls) -> "UNetConfig":
        """A miniature for 16x16 latents."""
        return cls(channels=(32, 64, 96, 96), heads=4, context_width=128, groups=8)


class UNet(nn.Module):
    """epsilon_theta(z_t, t, T(c)) of the paper's Eq. 2, and its internal features f_i of Eq. 3.

    `checkpoint_activations` (default False, may be set at any time) recomputes each block in the backward
    pass: the time of about one more forward pass for a fraction of the memory.
    """

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        channels, last = config.channels, len(config.channels) - 1
        time_width = 4 * channels[0]

        self.time_embedding = TimestepEmbedding(channels[0], time_width)
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)

        self.down_blocks = nn.ModuleList()
        skips = [channels[0]]  # the widths of the skip connections, in the order they are made
        for i, width in enumerate(channels):
            widths_in = [skips[-1]] + [width] * (config.layers - 1)
            self.down_blocks.append(Level(config, widths_in, width, attention=i < last, downsample=i < last))
            skips += [width] * (config.layers + (i < last))

        self.mid_block = Level(config, [channels[-1]] * 2, channels[-1], attention=True)
        del self.mid_block.attentions[1]  # residual block, transformer, residual block

        self.up_blocks = nn.ModuleList()
        below = channels[-1]
        for i, width in reversed(list(enumerate(channels))):
            widths_in = [x + skips.pop() for x in [below] + [width] * config.layers]
            self.up_blocks.append(Level(config, widths_in, width, attention=i < last, upsample=i > 0))
            below = width

        self.conv_norm_out = nn.GroupNorm(config.groups, channels[0])
        self.conv_out = nn.Conv2d(channels[0], config.latent_channels, 3, padding=1)

    def forward(self, latent: Tensor, t: Tensor, context: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Predict the noise `(B, 4, h, w)`; for the arguments see `features`."""
        finest = self.features(latent, t, context, lengths)[0]
        with own_type(self.conv_out.weight):
            return self.conv_out(norm_silu(self.conv_norm_out, finest))

    def features(
        self, latent: Tensor, t: Tensor, context: Tensor, lengths: Tensor | None = None
    ) -> list[Tensor]:
        """Return the up path's four maps, finest first: 320, 640, 1280, 1280 channels, strides 8, 16, 32, 64.

        latent `(B, 4, h, w)`, h and w multiples of 8; t `(B,)` int64 in 0..999; context `(B, L, 768)`, 1 <= L
        <= 1024; lengths `(B,)`: the number of context tokens of each image without padding (1..L), None = L.
        """
        with own_type(self.conv_in.weight):
            return self._forward(latent, t, context, lengths, with_attention=False)[0]

    def features_and_attention(
        self, latent: Tensor, t: Tensor, context: Tensor, lengths: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return `features`, and each pixel's attention to each token, `(B, L, h_i, w_i)`, strides 8, 16, 32.

        The mean over the heads and over the layers of each resolution, on both paths, without the
        middle block (VPD vpd/models.py, `AttentionStore`). float32; the sum over the L tokens is 1.
        """
        with own_type(self.conv_in.weight):
            return self._forward(latent, t, context, lengths, with_attention=True)

    def _forward(
        self, latent: Tensor, t: Tensor, context: Tensor, lengths: Tensor | None, with_attention: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Down, middle, up: the four feature maps and, `with_attention`, the attention maps (else [])."""
        self.check(latent, t, context, lengths)
        time = F.silu(self.time_embedding(t))  # (B, 1280); every block applies SiLU first
        dtype = self.conv_in.weight.dtype
        keys_values = self.keys_values(context.to(dtype))  # of each transformer, in the order of execution

        x = self.conv_in(latent.to(dtype))  # (B, 320, h, w)
        skips = [x]
        attention: list[list[Tensor | None]] = [[] for _ in self.down_blocks]  # per level, of each layer
        for level, weights in zip(self.down_blocks, attention, strict=True):
            for i in range(len(level.resnets)):
                x, layer_weights = self._block(level, i, x, time, keys_values, lengths, with_attention)
                weights.append(layer_weights)
                skips.append(x)
            if level.downsamplers:
                x = level.downsamplers(x)
                skips.append(x)

        for i in range(len(self.mid_block.resnets)):  # (B, 1280, h/8, w/8)
            x, _ = self._block(self.mid_block, i, x, time, keys_values, lengths, False)

        maps = []
        for level, weights in zip(self.up_blocks, reversed(attention), strict=True):
            for i in range(len(level.resnets)):
                x = torch.cat([x, skips.pop()], dim=1)
                x, layer_weights = self._block(level, i, x, time, keys_values, lengths, with_attention)
                weights.append(layer_weights)
                if i == TAP:
                    maps.append(x)
            x = level.upsamplers(x)
        maps[-1] = x  # the finest level has no upsampling: its map is the output
        if not with_attention:
            return maps[::-1], []
        return maps[::-1], [torch.stack(weights).mean(dim=0) for weights in attention[:-1]]

    def _block(
        self, level: "Level", i: int, x: Tensor, time: Tensor, keys_values: Iterator, *rest: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Residual block i of a level, and its transformer where there is one, with its attention or None."""
        x, residual = self._maybe_checkpoint(level.resnets[i], x, time)
        if i < len(level.attentions):
            return self._maybe_checkpoint(level.attentions[i], x, residual, *next(keys_values), *rest)
        return x.add_(residual), None

    def keys_values(self, context: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Project the context to keys and values `(B, L, n, d)` of all cross-attentions by one product."""
        levels = (*self.down_blocks, self.mid_block, *self.up_blocks)
        layers = [x.transformer_blocks[0].attn2 for level in levels for x in level.attentions]
        projections = [x for layer in layers for x in (layer.to_k, layer.to_v)]
        weights = [x.weight for x in projections]
        parts = linear(context, torch.cat(weights)).split([len(weight) for weight in weights], dim=-1)
        if isinstance(projections[0], LoRA):
            parts = [y + x.update(context) for y, x in zip(parts, projections, strict=True)]
        parts = [rearrange(x, "B L (n d) -> B L n d", n=self.config.heads) for x in parts]
        return zip(parts[::2], parts[1::2], strict=True)

    def _maybe_checkpoint(self, block: nn.Module, *inputs: Tensor | bool | None) -> Any:
        """Run the block, with activation checkpointing if `checkpoint_activations` is set."""
        if self.checkpoint_activations and torch.is_grad_enabled():
            # Nothing is drawn in a block; reading the random state would keep it out of a CUDA graph.
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    def check(self, latent: Tensor, t: Tensor, context: Tensor, lengths: Tensor | None) -> None:
        """Check shapes and types only: reading values would synchronise the GPU."""
        B, C, h, w = latent.shape
        step = 2 ** (len(self.config.channels) - 1)
        assert C == self.config.latent_channels, (
            f"the latent has {C} channels, not {self.config.latent_channels}"
        )
        assert h % step == 0 and w % step == 0, (
            f"the latent is {h}x{w}: pad the image so that both are multiples of {step} ({8 * step} pixels)"
        )
        assert t.shape == (B,) and t.dtype == torch.int64, (
            f"t is {t.dtype} {tuple(t.shape)}: pass one int64 time step per image, ({B},)"
        )
        L, width = context.shape[-2:]
        C = self.config.context_width
        assert len(context) == B and width == C and 1 <= L <= MAX_CONTEXT, (
            f"the context is {tuple(context.shape)}: pass ({B}, 1..{MAX_CONTEXT}, {C})"
        )
        assert lengths is None or lengths.shape == (B,), (
            f"lengths is {tuple(lengths.shape)}: pass one number of context tokens per image, ({B},)"
        )


class Level(nn.Module):
    """The blocks of one resolution: residual blocks, each followed by a transformer if `attention`.

    `widths_in`: the input channels of each block (in the up path including the skip connection's).
    """

    def __init__(
        self,
        config: UNetConfig,
        widths_in: list[int],
        width: int,
        attention: bool,
        downsample: bool = False,
        upsample: bool = False,
    ):
        super().__init__()
        time_width = 4 * config.channels[0]
        self.resnets = nn.ModuleList(ResnetBlock(x, width, time_width, config.groups) for x in widths_in)
        self.attentions = nn.ModuleList(SpatialTransformer(config, width) for _ in widths_in if attention)
        self.downsamplers = nn.Sequential(*[Downsample(width)] if downsample else [])
        self.upsamplers = nn.Sequential(*[Upsample(width)] if upsample else [])


class ResnetBlock(nn.Module):
    """Twice (norm, SiLU, 3x3 convolution) with the time embedding added in between; and the residual, apart:
    a transformer's norm adds the two as it reads them.
    """

    def __init__(self, in_channels: int, channels: int, time_width: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels)  # torch's eps, 1e-5, unlike the VAE's
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, channels)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, channels, 1) if in_channels != channels else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        h = norm_silu(self.norm1, x)  # reusing `h` frees the previous activation
        h = self.conv1(h)
        h = norm_silu(self.norm2, h, shift=self.time_emb_proj(time))
        return self.conv2(h), self.conv_shortcut(x)


class SpatialTransformer(nn.Module):
    """One transformer block over the h*w pixels of x + residual, added to them.

    context: k, v `(B, L, n, d)`, lengths and `with_attention`. If that, also returns the attention of each
    pixel to each token, `(B, L, h, w)`, else None.
    """

    def __init__(self, config: UNetConfig, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(config.groups, channels, eps=1e-6)  # CompVis attention.py `Normalize`
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(config, channels)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, residual: Tensor, *context: Any) -> tuple[Tensor, Tensor | None]:
        x, h = add_normed(self.norm, x, residual)
        h = rearrange(self.proj_in(h), "B C h w -> B (h w) C")
        h, weights = self.transformer_blocks[0](h, *context)
        if weights is not None:
            weights = rearrange(weights, "B (h w) L -> B L h w", h=x.shape[2])
        return x + self.proj_out(rearrange(h, "B (h w) C -> B C h w", h=x.shape[2])), weights


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context, feed-forward; each pre-norm and residual."""

    def __init__(self, config: UNetConfig, width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, config.heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, config.context_width, config.heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(
        self, x: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, with_attention: bool
    ) -> tuple[Tensor, Tensor | None]:
        x_norm = self.norm1(x)
        x = x + self.attn1(x_norm, *self.attn1.keys_values(x_norm))
        x_norm = self.norm2(x)
        x = x + self.attn2(x_norm, k, v, lengths)
        weights = self.attn2.attention_weights(x_norm, k, lengths) if with_attention else None  # (B, h w, L)
        return x + self.ff(self.norm3(x)), weights


class Attention(nn.Module):
    """Multi-head attention of pixels `(B, N, C)` to themselves or to the context, M keys.

    The keys and values of the context are arguments: `UNet.keys_values` computes those of all layers at once.
    """

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = Linear(width, width, bias=False)
        self.to_k = Linear(context_width, width, bias=False)
        self.to_v = Linear(context_width, width, bias=False)
        self.to_out = nn.Sequential(Linear(width, width))

    def forward(self, x: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
        y = attention(self.split(self.to_q(x)), k, v, lengths)
        return self.to_out(rearrange(y, "B N n d -> B N (n d)"))

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `(B, M, n, d)` of the tokens `(B, M, context width)`."""
        return self.split(self.to_k(tokens)), self.split(self.to_v(tokens))

    def attention_weights(self, x: Tensor, k: Tensor, lengths: Tensor | None) -> Tensor:
        """The attention of each pixel to each token, the mean over the heads: `(B, N, M)` float32."""
        return attention_maps(self.split(self.to_q(x)), k, lengths)

    def split(self, x: Tensor) -> Tensor:
        return rearrange(x, "B N (n d) -> B N n d", n=self.heads)


class LoRA(Linear):
    """W x + B A x: a frozen projection with a trained update of rank R (Hu et al., 2021, section 4.1).

    A `(R, C)` starts like a Linear's weight and B `(D, R)` at 0, so that the first output is that of W alone.
    The scale of the update, alpha / R there, is 1.
    """

    def __init__(self, projection: Linear, rank: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features = projection.in_features, projection.out_features
        self.weight, self.bias = projection.weight, projection.bias
        self.lora_A = nn.Parameter(nn.Linear(self.in_features, rank, bias=False).weight.detach())
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.update(x)

    def update(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))


def replace_projections(unet: UNet, new: Callable[[Linear], Linear]) -> None:
    """Replace every projection of the UNet's attentions, in place: queries, keys, values and outputs."""
    for layer in unet.modules():
        if isinstance(layer, Attention):
            layer.to_q, layer.to_k, layer.to_v = map(new, (layer.to_q, layer.to_k, layer.to_v))
            layer.to_out[0] = new(layer.to_out[0])


class FeedForward(nn.Module):
    """An MLP with a gated GELU, C -> 4 C -> C."""

    def __init__(self, width: int):
        super().__init__()
        # The identity stands for the official dropout of 0: it keeps the names `net.0` and `net.2`.
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class GEGLU(nn.Module):
    """value * gelu(gate): value is the first half of the projection, gate the second; gelu is exact."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)


class Downsample(nn.Module):
    """Halve the size; the padding is symmetric, unlike the VAE's."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Double the size: nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class TimestepEmbedding(nn.Module):
    """Time steps `(B,)` -> `(B, 1280)`: sinusoids, then a two-layer MLP."""

    def __init__(self, width: int, time_width: int):
        super().__init__()
        self.width = width
        self.linear_1 = nn.Linear(width, time_width)
        self.linear_2 = nn.Linear(time_width, time_width)

    def forward(self, t: Tensor) -> Tensor:
        waves = timestep_embedding(t, self.width).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoids of t `(B,)`, `(B, width)` float32: cosines first (CompVis diffusionmodules/util.py)."""
    half = width // 2
    i = torch.arange(half, device=t.device, dtype=torch.float32)
    frequency = torch.exp(-math.log(10_000) * i / half)
    angle = t[:, None].float() * frequency  # (B, width/2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def alphas_cumprod() -> Tensor:
    """alpha-bar_t of Eq. 1 for t = 0..999, `(1000,)` float32; the square roots of the betas are linear in t.

    CompVis ldm/modules/diffusionmodules/util.py, `make_beta_schedule`; v1-inference.yaml, `linear_start` and
    `linear_end`.
    """
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TIMES) ** 2
    return torch.cumprod(1 - betas, dim=0)
