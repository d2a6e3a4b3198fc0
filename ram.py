"""RAM, the Recognize Anything Model: which of 4,585 tags an image shows (arXiv:2306.03514).

A Swin-L tower turns the image into 144 tokens and their mean. Each tag has a query that attends to these 145
tokens in two layers of cross-attention; one linear layer, shared by all tags, gives its logit. An image has a
tag if the sigmoid of the logit is greater than the tag's own threshold (weights/ram.py loads both).

Attribute names are those of the official ram_swin_large_14m.pth, so its weights load strictly. Equal to
transformers' `SwinModel` and BLIP's text layers (tests/test_ram.py). The sources named below are those of
xinyu1205/recognize-anything.

Top to bottom: the model, its pixels, the head, the tower, its blocks, the windows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kernels.linear import Linear

MEAN = (0.485, 0.456, 0.406)  # of RGB in [0, 1], ImageNet's; ram/transform.py
STD = (0.229, 0.224, 0.225)
HEAD_EPS = 1e-12  # of the head's LayerNorms (ram/configs/q2l_config.json); Swin's have torch's 1e-5
MASKED = -100.0  # added to the logits of pairs that must not attend (ram/models/swin_transformer.py)
CHUNK = 2304  # tokens per call of an MLP, our choice: its hidden layer then stays in a CPU's cache


@dataclass(frozen=True)
class RAMConfig:
    """Sizes of the tower and the head; the default is the official Swin-L at 384x384."""

    image_size: int = 384
    patch: int = 4
    width: int = 192  # of the first stage; each further stage has twice the width and half the side
    depths: tuple[int, ...] = (2, 2, 18, 2)  # blocks per stage
    heads: tuple[int, ...] = (6, 12, 24, 48)  # per stage
    window: int = 12  # side of a window of attention, in tokens
    tags: int = 4585
    label_width: int = 512  # of the tags' embeddings (CLIP's text space) and of the head's keys
    head_width: int = 768
    head_layers: int = 2
    head_heads: int = 4


class RAM(nn.Module):
    """Images `(B, 3, H, W)` in [-1, 1] of any size -> logits `(B, K)` of the K = 4,585 tags."""

    def __init__(self, config: RAMConfig = RAMConfig()):
        super().__init__()
        self.config = config
        self.visual_encoder = Swin(config)
        self.image_proj = Linear(config.width * 2 ** (len(config.depths) - 1), config.label_width)
        self.label_embed = nn.Parameter(torch.randn(config.tags, config.label_width) * 0.02)
        self.wordvec_proj = Linear(config.label_width, config.head_width)
        self.tagging_head = TaggingHead(config)
        self.fc = Linear(config.head_width, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits `(B, K)` of images `(B, 3, H, W)` in [-1, 1]; sigmoids are probabilities."""
        tokens = self.visual_encoder(squash(image, self.config.image_size))  # (B, 144, 1536)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)  # (B, 145, 1536)
        queries = F.relu(self.wordvec_proj(self.label_embed[None]))  # (1, K, 768), the same for all images
        queries = self.tagging_head(queries, self.image_proj(tokens))  # (B, K, 768)
        return self.fc(queries)[..., 0]


@torch.no_grad()
def likely_tags(
    ram: RAM, image: Tensor, names: Sequence[str], thresholds: Tensor, threshold: float | None = None
) -> list[list[tuple[str, float]]]:
    """Tag images `(B, 3, H, W)`: the tags whose probability exceeds their own of `thresholds`, best first.

    thresholds `(K,)` in 0..1; a given `threshold` takes the place of all that are below 1.
    """
    if threshold is not None:
        thresholds = torch.where(thresholds < 1, threshold, thresholds)
    with torch.autocast(image.device.type, enabled=False):  # so that training and test have the same tags
        probabilities = ram(image).float().sigmoid()
    tags = []
    for p, above in zip(probabilities.cpu(), (probabilities > thresholds).cpu(), strict=True):
        likely = above.nonzero().flatten()
        order = likely[p[likely].argsort(descending=True, stable=True)].tolist()
        tags.append([(names[k], float(p[k])) for k in order])
    return tags


def squash(image: Tensor, size: int) -> Tensor:
    """Images `(B, 3, H, W)` in [-1, 1] -> `(B, 3, size, size)` float32, normalised as in RAM's training.

    Resizes to a square, not keeping the aspect ratio: bilinear with antialiasing (ram/transform.py).
    """
    image = image.float()
    if image.shape[-2:] != (size, size):
        image = F.interpolate(image, (size, size), mode="bilinear", antialias=True)
    channels = zip(image.unbind(dim=1), MEAN, STD, strict=True)
    return torch.stack([(x / 2 + 0.5 - mean) / std for x, mean, std in channels], dim=1)


class TaggingHead(nn.Module):
    """Queries `(1, K, 768)` of tags and tokens `(B, M, 512)` of images -> `(B, K, 768)`.

    A BERT without self-attention (ram/models/bert.py), so each query's result depends on the image alone.
    """

    def __init__(self, config: RAMConfig):
        super().__init__()
        layers = nn.ModuleList(TaggingLayer(config) for _ in range(config.head_layers))
        self.encoder = nn.ModuleDict({"layer": layers})

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        for layer in self.encoder["layer"]:
            queries = layer(queries, tokens)
        return queries


class TaggingLayer(nn.Module):
    """Cross-attention, MLP; each residual and post-norm."""

    def __init__(self, config: RAMConfig):
        super().__init__()
        width, context = config.head_width, config.label_width
        self.heads = config.head_heads
        projections = {"query": width, "key": context, "value": context}
        attention = nn.ModuleDict({name: Linear(inputs, width) for name, inputs in projections.items()})
        self.crossattention = nn.ModuleDict({"self": attention, "output": Residual(width, width)})
        self.intermediate = nn.ModuleDict({"dense": Linear(width, 4 * width)})
        self.output = Residual(4 * width, width)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        project = self.crossattention["self"]
        q, k, v = project["query"](x), project["key"](tokens), project["value"](tokens)
        q, k, v = (rearrange(y, "B N (n d) -> B n N d", n=self.heads) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q.expand(len(k), -1, -1, -1), k, v)  # (B, n, K, d)
        x = self.crossattention["output"](rearrange(y, "B n K d -> B K (n d)"), x)
        return in_chunks(lambda y: self.output(F.gelu(self.intermediate["dense"](y)), y), x)


class Residual(nn.Module):
    """LayerNorm(dense(y) + x)."""

    def __init__(self, in_width: int, width: int):
        super().__init__()
        self.dense = Linear(in_width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=HEAD_EPS)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(y).add_(x))


class Swin(nn.Module):
    """Pixels `(B, 3, 384, 384)` -> tokens `(B, 144, 1536)` after the final norm, row by row."""

    def __init__(self, config: RAMConfig):
        super().__init__()
        last = len(config.depths) - 1
        patches = nn.Conv2d(3, config.width, config.patch, stride=config.patch)
        self.patch_embed = nn.ModuleDict({"proj": patches, "norm": nn.LayerNorm(config.width)})
        self.layers = nn.ModuleList(Stage(config, i, downsample=i < last) for i in range(last + 1))
        self.norm = nn.LayerNorm(config.width * 2**last)

    def forward(self, pixels: Tensor) -> Tensor:
        project, norm = self.patch_embed["proj"], self.patch_embed["norm"]
        pixels = pixels.to(project.weight.dtype, memory_format=torch.channels_last)
        x = norm(rearrange(project(pixels), "B C h w -> B (h w) C"))  # (B, 9216, 192), one per 4x4 pixels
        for stage in self.layers:
            x = stage(x)
        return self.norm(x)


class Stage(nn.Module):
    """Blocks on a square of tokens `(B, N, C)`, then (except in the last stage) `(B, N / 4, 2 C)`.

    Every second block shifts its windows by half a window, unless one window holds all tokens. Within the
    stage the tokens stay window by window: all but attention treats each token alone.
    """

    def __init__(self, config: RAMConfig, index: int, downsample: bool):
        super().__init__()
        self.side = config.image_size // config.patch // 2**index  # 96, 48, 24, 12
        self.window = config.window
        assert self.side % self.window == 0, f"{self.side} tokens a side: need a multiple of {self.window}"
        self.shift = self.window // 2 if self.side > self.window else 0
        width, heads = config.width * 2**index, config.heads[index]
        self.blocks = nn.ModuleList(Block(width, heads, self.window) for _ in range(config.depths[index]))
        self.downsample = PatchMerging(width, self.side) if downsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        order = window_order(self.side, self.window, 0, x.device)
        shifted = window_order(self.side, self.window, self.shift, x.device)
        to_shifted, to_order = order.argsort()[shifted], shifted.argsort()[order]
        mask = shift_mask(shifted, self.side, self.window, self.shift).to(x.dtype)
        x = x.index_select(1, order)
        for i, block in enumerate(self.blocks):
            if i % 2 and self.shift:
                x = block(x.index_select(1, to_shifted), mask).index_select(1, to_order)
            else:
                x = block(x)
        return self.downsample(x.index_select(1, order.argsort()))


class PatchMerging(nn.Module):
    """Concatenate 2x2 tokens, down each column first, and halve the channels: `(B, N / 4, 2 C)`."""

    def __init__(self, width: int, side: int):
        super().__init__()
        self.side = side
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = rearrange(x, "B (h i w j) C -> B (h w) (j i C)", h=self.side // 2, i=2, j=2)
        return self.reduction(self.norm(x))


class Block(nn.Module):
    """Attention within windows, MLP; each pre-norm and residual. Tokens `(B, N, C)`, window by window."""

    def __init__(self, width: int, heads: int, window: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, window)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.attn(self.norm1(x), mask).add_(x)
        return self.mlp(self.norm2(x)).add_(x)


class WindowAttention(nn.Module):
    """Self-attention in windows, with a learned bias for each relative position. Tokens `(B, N, C)`."""

    def __init__(self, width: int, heads: int, window: int):
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.02)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`mask` `(m, 1, M, M)` is added to the logits in the m windows, of M tokens each, of every image."""
        q, k, v = rearrange(
            self.qkv(x), "B (m M) (three n d) -> three (B m) n M d", three=3, n=self.heads, M=self.window**2
        )
        bias = self.bias()  # (1, n, M, M)
        if mask is not None:
            bias = (bias + mask).expand(len(x), -1, -1, -1, -1).flatten(0, 1)  # (B m, n, M, M)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(rearrange(y, "(B m) n M d -> B (m M) (n d)", B=len(x)))

    def bias(self) -> Tensor:
        """The bias `(1, n, M, M)` of every query and key of a window.

        The table's entry (r, c) is for a query r - 11 rows below and c - 11 columns to the right of the key.
        So the query at (i, j) reads the table's 12x12 entries from (i, j) on, for the keys in reverse order.
        """
        side = 2 * self.window - 1
        table = rearrange(self.relative_position_bias_table, "(r c) n -> n r c", r=side)
        bias = table.unfold(1, self.window, 1).unfold(2, self.window, 1).flip(3, 4)  # (n, 12, 12, 12, 12)
        return rearrange(bias, "n i j y x -> 1 n (i j) (y x)")


class MLP(nn.Module):
    """C -> 4 C -> C with the exact GELU."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return in_chunks(lambda y: self.fc2(F.gelu(self.fc1(y))), x)


def in_chunks(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply `function`, which treats every token alike, to `x` `(B, N, C)`, CHUNK tokens at a time."""
    if x.shape[1] <= CHUNK:
        return function(x)
    return torch.cat([function(y) for y in x.split(CHUNK, dim=1)], dim=1)


def window_order(side: int, window: int, shift: int, device: torch.device) -> Tensor:
    """The indices `(N,)` of a square's tokens, window by window; windows shift down and to the right.

    They continue at the other end: the last ones also hold the first `shift` rows or columns.
    """
    tokens = torch.arange(side * side, device=device).reshape(side, side)
    tokens = tokens.roll((-shift, -shift), dims=(0, 1))
    return rearrange(tokens, "(h i) (w j) -> (h w i j)", i=window, j=window)


def shift_mask(order: Tensor, side: int, window: int, shift: int) -> Tensor:
    """The mask `(m, 1, M, M)` of the shifted windows of `order`: 0, or MASKED for tokens from two ends."""
    first_rows, first_columns = order // side < shift, order % side < shift
    region = (first_rows * 2 + first_columns).reshape(-1, 1, window**2)  # (m, 1, M)
    return (region[..., :, None] != region[..., None, :]) * MASKED
