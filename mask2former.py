"""Mask2Former-lite: the UNet's four feature maps to a set of segments, each a class and a mask; its loss.

Masked-attention Mask Transformer (Cheng et al. 2022, arXiv:2112.01527; the paper's Table 4) in plain PyTorch.
Q learned queries x_q attend to the image. After every layer a query predicts

    its class    softmax(W x_q) over the K classes and "no object",
    its mask     m_q(p) = e(x_q) . F(p), one logit per pixel p of the mask features F at stride 4,

and in the next layer's cross-attention query q attends only to the pixels where its mask is at least 1/2. All
predictions are trained (deep supervision): one before the first layer, one after each. Segments have no
order, so the loss first matches segments and queries one to one with the lowest total cost.

Equal to transformers' `Mask2FormerForUniversalSegmentation` (tests/test_mask2former.py), given its `backbone`
maps, with three exceptions: the maps have strides 8..64 and are upsampled to 4..32; a matching cost that is
not finite makes the loss nan; no points are sampled in padding, if the target has a size.

Top to bottom: inputs and outputs, the decoder, its pixel decoder, deformable attention, the query layers,
matching and sampled losses, from a prediction to segments.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from decoders import CHANNELS, SemanticDecoder, resize

Size = tuple[int, int]
Rand = Callable[..., Tensor]  # `rand(*shape, device=)` draws uniformly from [0, 1)

COCO_THINGS = (True,) * 80 + (False,) * 53  # panoptic_coco_categories.json, `isthing`
LEVELS = 3  # maps of the pixel decoder that pixels and queries attend to: strides 32, 16, 8
SAMPLES = 4  # of deformable attention, per head and level (arXiv:2010.04159)
# Weights and points: Mask2Former configs/coco/panoptic-segmentation/*.yaml, section MODEL.MASK_FORMER.
CLASS_WEIGHT, MASK_WEIGHT, DICE_WEIGHT = 2.0, 5.0, 5.0  # of the loss and the matching cost
SCORE = OVERLAP = 0.8  # minimum of a kept segment (the same files, TEST; ODISE's score is 0)
NO_OBJECT = 0.1  # class weight of queries without a segment
OVERSAMPLE = 3  # candidates per point of the mask losses
IMPORTANT = 0.75  # fraction of the points that are the most uncertain candidates


class Target(NamedTuple):
    """The ground-truth segments of one image: each thing, and each stuff class as one; no crowd, no void.

    classes `(S,)` int64 in 0..K-1, masks `(S, H, W)` bool at the size of the padded image. S may be 0 or
    exceed the number of queries. size: height and width of the image without padding, None = (H, W); padding
    has no loss.
    """

    classes: Tensor
    masks: Tensor
    size: Size | None = None


class Queries(NamedTuple):
    """The predictions of the queries before the first layer and after each; the same in evaluation."""

    classes: tuple[Tensor, ...]  # (B, Q, K+1) logits each; the last class is "no object"
    masks: tuple[Tensor, ...]  # (B, Q, H/4, W/4) logits each


class PredictedSegment(NamedTuple):
    """One predicted segment."""

    id: int  # its value in `Panoptic.ids`
    label: int  # class, 0..K-1
    score: float  # probability of the class; for merged stuff, the highest


class Panoptic(NamedTuple):
    """At most one segment per pixel: ids `(H, W)` int64, 0 = void, 1.. = the id of one of `segments`."""

    ids: Tensor
    segments: list[PredictedSegment]


class Instances(NamedTuple):
    """S things, which may overlap, best first: labels `(S,)` int64, scores `(S,)`, masks `(S, H, W)` bool."""

    labels: Tensor
    scores: Tensor
    masks: Tensor


class Mask2Former(nn.Module):
    """A pixel decoder, then `layers` layers of masked attention.

    `things`: whether each of the K classes has instances. `points`: the number sampled per mask in the loss,
    at most a quarter of the image's pixels.
    """

    def __init__(
        self,
        channels: Sequence[int] = CHANNELS,
        things: Sequence[bool] = COCO_THINGS,
        width: int = 256,
        heads: int = 8,
        queries: int = 100,
        layers: int = 9,
        pixel_layers: int = 6,
        groups: int = 32,
        points: int = 12_544,
    ):
        super().__init__()
        assert width % heads == 0 and width % 4 == 0, (
            f"width {width} must be a multiple of {heads} heads and of 4 (for the position encoding)"
        )
        self.channels, self.things, self.points = tuple(channels), tuple(things), points
        self.pixel_decoder = DeformablePixelDecoder(channels, width, heads, pixel_layers, groups)
        self.level_embed = nn.Parameter(torch.randn(LEVELS, width))
        self.query_features = nn.Parameter(torch.randn(queries, width))
        self.query_places = nn.Parameter(torch.randn(queries, width))
        self.layers = nn.ModuleList(QueryLayer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.class_head = nn.Linear(width, len(self.things) + 1)
        self.mask_head = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
        )

    check = SemanticDecoder.check  # of the features, as every decoder's

    def forward(self, features: Sequence[Tensor]) -> Queries:
        """Predict from four maps `(B, C_i, h_i, w_i)`, finest first, at strides 8, 16, 32, 64."""
        self.check(features)
        mask_features, maps = self.pixel_decoder(features)  # (B, C, H/4, W/4), strides 32, 16, 8
        memory = [flatten(x) + level for x, level in zip(maps, self.level_embed)]  # (B, M_i, C)
        positions = [sine_positions(x.shape[2:], x.shape[1], x.device) for x in maps]  # (M_i, C)

        x = self.query_features.expand(len(mask_features), -1, -1)  # (B, Q, C)
        predictions = [self.predict(x, mask_features)]
        for i, layer in enumerate(self.layers):
            level = i % LEVELS
            allowed = attention_mask(predictions[-1][1], maps[level].shape[2:])  # (B, Q, M_i)
            x = layer(x, self.query_places, memory[level], positions[level], allowed)
            predictions.append(self.predict(x, mask_features))
        return Queries(*zip(*predictions))

    def predict(self, x: Tensor, mask_features: Tensor) -> tuple[Tensor, Tensor]:
        """Queries `(B, Q, C)` -> class logits `(B, Q, K+1)`, mask logits `(B, Q, H/4, W/4)`."""
        x = self.norm(x)
        return self.class_head(x), torch.einsum("BQC,BChw->BQhw", self.mask_head(x), mask_features)

    # ---- the loss

    def loss(
        self, prediction: Queries, targets: Sequence[Target], rand: Rand | Sequence[Rand] = torch.rand
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return (float32 weighted sum over all layers, count) of class, mask and dice.

        The caller divides by max(count, 1), the count summed over all processes and accumulation steps, so
        that each segment of the global batch has the same weight. `rand`, one for all images or one per
        image, draws the points: per layer, the last one first, a set for each image's matching, then those of
        its matched masks. With one per image, results do not depend on how the global batch is split. If
        logits are nan or infinite, nothing can be matched and the sum of `class` is nan; raising an error on
        one rank would hang the others in the all-reduce.
        """
        B, _, h, w = prediction.masks[-1].shape
        assert len(targets) == B, f"{len(targets)} targets for {B} images: pass one per image"
        for classes, masks, _ in targets:
            assert classes.dtype == torch.int64 and masks.dtype == torch.bool, (
                f"a target has {classes.dtype} classes and {masks.dtype} masks: pass int64 and bool"
            )
            assert masks.shape == (len(classes), 4 * h, 4 * w), (
                f"a target has masks {tuple(masks.shape)}: pass {(len(classes), 4 * h, 4 * w)}, "
                "one per class, padded like the image"
            )
        rands = [rand] * B if callable(rand) else rand
        order = [-1, *range(len(prediction.classes) - 1)]
        targets = [x._replace(masks=x.masks.float()) for x in targets]  # once for all layers
        with torch.autocast(prediction.masks[-1].device.type, enabled=False):
            layers = [(prediction.classes[i].float(), prediction.masks[i].float()) for i in order]
            parts = [self.layer_loss(*layer, targets, rands) for layer in layers]
        sums, counts = (sum(x) for x in zip(*parts)), self.counts(targets)
        return {name: (total, counts[name]) for name, total in zip(counts, sums, strict=True)}

    def counts(self, targets: Sequence[Target]) -> dict[str, Tensor]:
        """The counts of `loss` from the targets only: float32 scalars.

        `class` counts the queries, those without a segment times 0.1; `mask` and `dice` count the segments,
        including those beyond the number of queries (as upstream).
        """
        Q = len(self.query_features)
        matched = sum(min(len(target.classes), Q) for target in targets)
        queries = matched + NO_OBJECT * (len(targets) * Q - matched)
        segments = sum(len(target.classes) for target in targets)
        counts = {"class": queries, "mask": segments, "dice": segments}
        return {name: torch.tensor(float(x), device=targets[0].classes.device) for name, x in counts.items()}

    def layer_loss(
        self, classes: Tensor, masks: Tensor, targets: Sequence[Target], rands: Sequence[Rand]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The three weighted sums of one layer, from logits `(B, Q, K+1)` and `(B, Q, h, w)`."""
        K, (h, w) = len(self.things), masks.shape[2:]
        P = min(self.points, 4 * h * w)  # 4 h w is a quarter of the pixels
        costs = matching_costs(classes, masks, targets, P, rands)
        matches = match(costs)

        target_classes = torch.full(classes.shape[:2], K, device=classes.device)  # (B, Q)
        for row, target, (queries, segments) in zip(target_classes, targets, matches):
            row[queries] = target.classes[segments]
        weight = classes.new_ones(K + 1)
        weight[K] = NO_OBJECT
        by_class = F.cross_entropy(classes.flatten(0, 1), target_classes.flatten(), weight, reduction="sum")
        by_class = by_class + 0 * sum(cost.sum() for cost in costs)  # nan if a cost is not finite

        matched = torch.cat([x[queries] for x, (queries, _) in zip(masks, matches)])  # (S, h, w)
        sizes = [len(queries) for queries, _ in matches]
        limits = torch.cat([unpadded(x).expand(n, 1, 2) for x, n in zip(targets, sizes)])

        def rand(S: int, *shape: int, device: torch.device) -> Tensor:
            return torch.cat([draw(n, *shape, device=device) for draw, n in zip(rands, sizes)])

        points = uncertain_points(matched.detach(), limits, P, rand)  # (S, P, 2)
        parts = zip(targets, matches, points.split(sizes))
        labels = torch.cat([sample(target.masks[s], part) for target, (_, s), part in parts])
        by_mask, by_dice = mask_losses(sample(matched, points), labels)
        return CLASS_WEIGHT * by_class, MASK_WEIGHT * by_mask, DICE_WEIGHT * by_dice

    # ---- from a prediction to segments; all sizes are (H, W)

    def panoptic(
        self,
        prediction: Queries,
        padded: Size,
        real: Size | None = None,
        size: Size | None = None,
        score: float = SCORE,
        overlap: float = OVERLAP,
    ) -> list[Panoptic]:
        """The panoptic segments of each image at `size`.

        padded: the size of the padded image; real: its size without padding, by default `padded`; size: by
        default `real`. Drops queries whose class is less likely than `score` or that keep less than `overlap`
        of their mask (0.8 and 0.8 in Mask2Former; ODISE's score is 0).
        """
        results = []
        for classes, masks in zip(prediction.classes[-1].float(), prediction.masks[-1].float()):
            scores, labels = classes.softmax(-1).max(-1)
            kept = (labels != len(self.things)) & (scores > score)
            probabilities = (
                resize_masks(x[None, None], padded, real, size)[0, 0].sigmoid() for x in masks[kept]
            )
            final = size or real or padded
            results.append(
                panoptic_segments(scores[kept], labels[kept], probabilities, final, self.things, overlap)
            )
        return results

    def instances(
        self,
        prediction: Queries,
        padded: Size,
        real: Size | None = None,
        size: Size | None = None,
        top: int = 100,
    ) -> list[Instances]:
        """The things among the `top` most likely (query, class) pairs of each image; sizes as in `panoptic`.

        The score is the class probability times the mean probability of the mask's pixels. A query may give
        several instances, of different classes (Mask2Former's `instance_inference`).
        """
        results = []
        for classes, masks in zip(prediction.classes[-1].float(), prediction.masks[-1].float()):
            scores = classes.softmax(-1)[:, :-1].flatten()  # (Q K,)
            scores, pairs = scores.topk(min(top, len(scores)))
            queries, labels = pairs // len(self.things), pairs % len(self.things)
            is_thing = torch.tensor(self.things, device=labels.device)[labels]
            scores, queries, labels = scores[is_thing], queries[is_thing], labels[is_thing]
            final, few = size or real or padded, min(len(queries), 2)
            inside = torch.empty(len(queries), *final, dtype=torch.bool, device=masks.device)
            certainty = torch.empty_like(scores)
            for i, x in enumerate(masks[queries]):  # one after the other, as in `panoptic_segments`
                logits = resize_masks(x[None, None], padded, real, size)[0]
                inside[i] = logits[0] > 0
                # Of a single mask torch would share the sum among threads, which rounds differently.
                total = (logits.sigmoid_() * inside[i]).expand(few, -1, -1).sum(dim=(1, 2))[0]
                certainty[i] = total / (inside[i].sum() + 1e-6)
            scores, order = (scores * certainty).sort(descending=True)
            results.append(Instances(labels[order], scores, inside[order]))
        return results

    def semantic(self, prediction: Queries, size: Size) -> Tensor:
        """Per class, the sum over queries of class times mask probability, `(B, K, H, W)` float32."""
        classes = prediction.classes[-1].float().softmax(-1)[..., :-1]
        masks = resize(prediction.masks[-1].float(), size).sigmoid()
        with torch.autocast(masks.device.type, enabled=False):
            return torch.einsum("BQK,BQHW->BKHW", classes, masks)

    def logits(self, prediction: Queries, size: Size) -> Tensor:
        """The logarithm of `semantic` at `size`: its softmax is the normalised class score."""
        return self.semantic(prediction, size).clamp_(min=torch.finfo(torch.float32).tiny).log_()


# ---- the pixel decoder: features -> mask features (B, C, H/4, W/4) and maps at strides 32, 16, 8


class DeformablePixelDecoder(nn.Module):
    """Deformable attention among the pixels of the three coarser maps; the finest is added as in a pyramid.

    Runs in float32 under autocast: bfloat16 cannot represent positions within a pixel (as upstream).
    """

    def __init__(self, channels: Sequence[int], width: int, heads: int, layers: int, groups: int):
        super().__init__()
        finest, *coarser = channels
        self.input_projections = nn.ModuleList(
            lateral(x, width, groups, bias=True) for x in reversed(coarser)
        )
        self.level_embed = nn.Parameter(torch.randn(LEVELS, width))
        self.layers = nn.ModuleList(DeformableLayer(width, heads) for _ in range(layers))
        self.lateral = lateral(finest, width, groups)
        self.output = output(width, groups)
        self.mask_projection = xavier(nn.Conv2d(width, width, 1))

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        with torch.autocast(features[0].device.type, enabled=False):
            finest, *coarser = (x.to(self.level_embed.dtype) for x in features)
            maps = [project(x) for project, x in zip(self.input_projections, reversed(coarser))]
            sizes = [tuple(x.shape[2:]) for x in maps]

            x = torch.cat([flatten(x) for x in maps], dim=1)  # (B, N, C), N = sum of h_i w_i
            positions = torch.cat(
                [sine_positions(s, x.shape[2], x.device) + e for s, e in zip(sizes, self.level_embed)]
            )
            centres = torch.cat([pixel_centres(size, x.device) for size in sizes])  # (N, 2)
            for layer in self.layers:
                x = layer(x, positions.to(x.dtype), centres, sizes)

            pixels = x.split([h * w for h, w in sizes], dim=1)
            maps = [rearrange(x, "B (h w) C -> B C h w", h=h) for x, (h, _) in zip(pixels, sizes)]
            finest = self.lateral(finest)  # (B, C, H/4, W/4)
            finest = self.output(finest + resize(maps[-1], finest.shape[2:]))
            return self.mask_projection(finest), maps


def lateral(in_channels: int, width: int, groups: int, bias: bool = False) -> nn.Sequential:
    """Project to the common width and double the size: strides 8..64 become 4..32.

    Bilinear interpolation and a 1x1 convolution commute, so the convolution runs first, on a quarter of the
    pixels.
    """
    conv = xavier(nn.Conv2d(in_channels, width, 1, bias=bias))
    twice = nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=False)
    return nn.Sequential(conv, twice, nn.GroupNorm(groups, width))


def output(width: int, groups: int) -> nn.Sequential:
    """A 3x3 convolution, GroupNorm, ReLU."""
    conv = xavier(nn.Conv2d(width, width, 3, padding=1, bias=False))
    return nn.Sequential(conv, nn.GroupNorm(groups, width), nn.ReLU(inplace=True))


def flatten(x: Tensor) -> Tensor:
    """`(B, C, h, w)` -> `(B, h w, C)`."""
    return rearrange(x, "B C h w -> B (h w) C")


def sine_positions(size: Size, width: int, device: torch.device) -> Tensor:
    """The position encoding `(h w, C)` float32: half of the channels for y, half for x (arXiv:2005.12872).

    Per axis of length n, alternating sines and cosines of 2 pi (i + 1) / n over powers of 10,000.
    """
    half = width // 2
    waves = 10_000 ** (2 * (torch.arange(half, device=device) // 2) / half)

    def axis(n: int) -> Tensor:
        positions = torch.arange(1, n + 1, device=device) / (n + 1e-6) * 2 * math.pi
        angles = positions[:, None] / waves  # (n, C/2)
        return torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=2).flatten(1)

    h, w = size
    y, x = axis(h)[:, None].expand(-1, w, -1), axis(w)[None].expand(h, -1, -1)
    return torch.cat([y, x], dim=2).flatten(0, 1)


def pixel_centres(size: Size, device: torch.device) -> Tensor:
    """The centre of each pixel, x and y in 0..1: `(h w, 2)` float32."""
    h, w = size
    y, x = (torch.arange(h, device=device) + 0.5) / h, (torch.arange(w, device=device) + 0.5) / w
    return torch.stack([x.expand(h, w), y[:, None].expand(h, w)], dim=2).flatten(0, 1)


class DeformableLayer(nn.Module):
    """Post-norm layer: deformable attention over all levels, then an MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = DeformableAttention(width, heads)
        self.attention_norm = nn.LayerNorm(width)
        self.ffn = ffn(width, 4 * width)  # 1,024, although upstream's configuration has 2,048
        self.ffn_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, positions: Tensor, centres: Tensor, sizes: Sequence[Size]) -> Tensor:
        x = self.attention_norm(x + self.attention(x, positions, centres, sizes))
        return self.ffn_norm(x + self.ffn(x))


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Zhu et al. 2021, arXiv:2010.04159).

    Instead of comparing a query with all keys, the query predicts, for each head and level, four offsets from
    its own position at which to sample, and their weights.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.sampling_offsets = nn.Linear(width, heads * LEVELS * SAMPLES * 2)
        self.attention_weights = nn.Linear(width, heads * LEVELS * SAMPLES)
        self.value_proj = xavier(nn.Linear(width, width))
        self.output_proj = xavier(nn.Linear(width, width))

        # At initialisation head k samples in the direction 2 pi k / n, on squares at distance 1, 2, 3, 4.
        angles = torch.arange(heads, device="cpu") * 2 * math.pi / heads
        rays = torch.stack([angles.cos(), angles.sin()], dim=1)
        rays = rays / rays.abs().amax(dim=1, keepdim=True)  # (n, 2)
        steps = torch.stack([i * rays for i in range(1, SAMPLES + 1)], dim=1)[:, None]  # (n, 1, SAMPLES, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(steps.expand(-1, LEVELS, -1, -1).flatten())
        for x in (self.sampling_offsets.weight, *self.attention_weights.parameters()):
            nn.init.zeros_(x)

    def forward(self, x: Tensor, positions: Tensor, centres: Tensor, sizes: Sequence[Size]) -> Tensor:
        """x `(B, N, C)`, the pixels of all levels; positions `(N, C)`; centres `(N, 2)` -> `(B, N, C)`."""
        query = x + positions
        offsets = self.sampling_offsets(query).unflatten(-1, (self.heads, LEVELS, SAMPLES, 2))
        weights = rearrange(self.attention_weights(query), "B N (n i) -> B N n i", n=self.heads).softmax(-1)
        weights = weights.unflatten(-1, (LEVELS, SAMPLES))
        pixels = torch.tensor([(w, h) for h, w in sizes], device=x.device)  # the offsets' unit, per level
        points = centres[:, None, None, None] + offsets / pixels[:, None]
        value = rearrange(self.value_proj(x), "B N (n d) -> B N n d", n=self.heads)
        return self.output_proj(deformable_attention(value, sizes, points, weights))


def deformable_attention(value: Tensor, sizes: Sequence[Size], points: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of values sampled bilinearly at points: `(B, N, C)`.

    value `(B, M, n, d)`: the M pixels of all levels of the given sizes (h, w); points `(B, N, n, LEVELS,
    SAMPLES, 2)`: x and y, 0..1 from edge to edge, 0 outside; weights `(B, N, n, LEVELS, SAMPLES)`.
    """
    B = len(value)
    total = 0
    for level, pixels in enumerate(value.split([h * w for h, w in sizes], dim=1)):
        pixels = rearrange(pixels, "B (h w) n d -> (B n) d h w", h=sizes[level][0])
        grid = rearrange(2 * points[:, :, :, level] - 1, "B N n sample xy -> (B n) sample N xy")
        weight = rearrange(weights[:, :, :, level], "B N n sample -> (B n) 1 sample N")
        weight = weight.contiguous()  # for speed
        values = F.grid_sample(pixels.to(grid.dtype), grid, align_corners=False)  # (B n, d, SAMPLES, N)
        total = total + (values * weight).sum(2)
    return rearrange(total.to(value.dtype), "(B n) d N -> B N (n d)", B=B)


# ---- the queries


class QueryLayer(nn.Module):
    """Post-norm layer: masked cross-attention to the image, self-attention, MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.cross_attention = Attention(width, heads)
        self.cross_norm = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads)
        self.self_norm = nn.LayerNorm(width)
        self.ffn = ffn(width, 8 * width)
        self.ffn_norm = nn.LayerNorm(width)

    def forward(
        self, x: Tensor, x_positions: Tensor, memory: Tensor, positions: Tensor, allowed: Tensor
    ) -> Tensor:
        """x `(B, Q, C)`, memory `(B, M, C)`, their positions `(Q, C)`, `(M, C)`; allowed `(B, Q, M)` bool."""
        key = memory + positions.to(memory.dtype)
        x = self.cross_norm(x + self.cross_attention(x + x_positions, key, memory, allowed))
        query = x + x_positions
        x = self.self_norm(x + self.self_attention(query, query, x))
        return self.ffn_norm(x + self.ffn(x))


class Attention(nn.Module):
    """Multi-head attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        # nn.MultiheadAttention initialises one matrix (3 C, C): smaller than three (C, C) by sqrt(2).
        self.q = xavier(nn.Linear(width, width), gain=2**-0.5)
        self.k = xavier(nn.Linear(width, width), gain=2**-0.5)
        self.v = xavier(nn.Linear(width, width), gain=2**-0.5)
        self.out = xavier(nn.Linear(width, width))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        """`(B, N, C), (B, M, C), (B, M, C)`, allowed keys `(B, N, M)` bool, None = all -> `(B, N, C)`."""
        q, k, v = (
            rearrange(linear(x), "B N (n d) -> B n N d", n=self.heads)
            for linear, x in ((self.q, query), (self.k, key), (self.v, value))
        )
        x = F.scaled_dot_product_attention(q, k, v, None if allowed is None else allowed[:, None])
        return self.out(rearrange(x, "B n N d -> B N (n d)"))


def attention_mask(masks: Tensor, size: Size) -> Tensor:
    """The pixels of a level that each query may attend to: those of its mask `(B, Q, H/4, W/4)`.

    `(B, Q, h w)` bool; a query with an empty mask may attend to all pixels. Carries no gradient.
    """
    inside = resize(masks.detach(), size).flatten(2) >= 0
    return inside | ~inside.any(dim=2, keepdim=True)


def ffn(width: int, hidden: int) -> nn.Sequential:
    """A two-layer MLP, C -> hidden -> C, with Xavier-uniform weights."""
    first, second = nn.Linear(width, hidden), nn.Linear(hidden, width)
    for linear in (first, second):
        nn.init.xavier_uniform_(linear.weight)
    return nn.Sequential(first, nn.ReLU(inplace=True), second)


def xavier(module: nn.Module, gain: float = 1.0) -> nn.Module:
    """Initialise with Xavier-uniform weights and zero biases; return the module."""
    nn.init.xavier_uniform_(module.weight, gain)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


# ---- matching and sampled losses


@torch.no_grad()
def matching_costs(
    classes: Tensor, masks: Tensor, targets: Sequence[Target], points: int, rands: Sequence[Rand]
) -> list[Tensor]:
    """The cost of matching each query to each segment, per image: `(Q, S)` float32.

    2 (-class probability) + 5 (mask cross-entropy) + 5 (mask dice), with the masks sampled at `points` random
    points, the same for all pairs. Float32 logits `(B, Q, K+1)` and `(B, Q, h, w)`; `rands` draw the points,
    one per image.
    """
    costs = []
    for class_logits, mask_logits, target, draw in zip(classes, masks, targets, rands):
        positions = draw(1, points, 2, device=masks.device) * unpadded(target)  # (1, P, 2)
        logits = sample(mask_logits, positions)  # (Q, P)
        labels = sample(target.masks.float(), positions)  # (S, P)

        by_class = -class_logits.softmax(-1)[:, target.classes]  # (Q, S)
        # -t log p - (1 - t) log(1 - p) = softplus(x) - t x
        by_mask = (F.softplus(logits).sum(1, keepdim=True) - logits @ labels.T) / points
        p = logits.sigmoid()
        by_dice = 1 - (2 * p @ labels.T + 1) / (p.sum(1, keepdim=True) + labels.sum(1) + 1)
        costs.append(CLASS_WEIGHT * by_class + MASK_WEIGHT * by_mask + DICE_WEIGHT * by_dice)

    return costs


def match(costs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return the matched queries and segments of each image, min(Q, S) indices of each, int64.

    The assignment with the lowest sum of costs `(Q, S)`; costs that are not finite count as 0.
    """
    from scipy.optimize import linear_sum_assignment  # a second to import, which only the loss needs

    joined = torch.cat(list(costs), dim=1).cpu()  # synchronises the GPU only once
    matches = []
    for cost in joined.nan_to_num(0, 0, 0).split([x.shape[1] for x in costs], dim=1):
        pairs = linear_sum_assignment(cost.numpy())
        matches.append(tuple(torch.from_numpy(x).to(costs[0].device) for x in pairs))
    return matches


def uncertain_points(logits: Tensor, limits: Tensor, points: int, rand: Rand) -> Tensor:
    """Sample the points of the mask losses, `(S, P, 2)`, mostly where the logits `(S, h, w)` are close to 0.

    0.75 P are the most uncertain of 3 P random candidates, the others are random (PointRend,
    arXiv:1912.08193). points: P; limits `(S, 1, 2)`, see `unpadded`.
    """
    S, important = len(logits), int(IMPORTANT * points)
    candidates = rand(S, OVERSAMPLE * points, 2, device=logits.device) * limits
    best = sample(logits, candidates).abs().topk(important, largest=False, sorted=False).indices
    uncertain = candidates.gather(1, best[..., None].expand(-1, -1, 2))
    return torch.cat([uncertain, rand(S, points - important, 2, device=logits.device) * limits], dim=1)


def unpadded(target: Target) -> Tensor:
    """The fractions of width and height that are not padding: `(2,)`."""
    H, W = target.masks.shape[1:]
    h, w = target.size or (H, W)
    return torch.tensor([w / W, h / H], device=target.masks.device)


def sample(masks: Tensor, points: Tensor) -> Tensor:
    """Sample masks `(S, h, w)` bilinearly at points `(S, P, 2)`, or `(1, P, 2)` for all masks: `(S, P)`.

    Points are x and y, 0..1 from edge to edge; 0 outside.
    """
    grid = 2 * points[:, None] - 1
    if len(points) == len(masks):
        return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0, 0]
    return F.grid_sample(masks[None], grid, align_corners=False)[0, :, 0]


def mask_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over masks of the mean cross-entropy and of the dice loss 1 - (2 sum pt + 1) / (sum p + sum t + 1).

    Both arguments `(S, P)`; labels in 0..1.
    """
    by_mask = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1).sum()
    p = logits.sigmoid()
    by_dice = 1 - (2 * (p * labels).sum(1) + 1) / (p.sum(1) + labels.sum(1) + 1)
    return by_mask, by_dice.sum()


# ---- from masks to segments


def resize_masks(masks: Tensor, padded: Size, real: Size | None, size: Size | None) -> Tensor:
    """Resize mask logits `(B, Q, h, w)` to the padded image, crop the padding, resize to `size`."""
    real = real or padded
    masks = resize(masks, padded)[..., : real[0], : real[1]]
    return masks if size in (None, real) else resize(masks, size)


@torch.no_grad()
def panoptic_segments(
    scores: Tensor,
    labels: Tensor,
    probabilities: Iterable[Tensor],
    size: Size,
    things: Sequence[bool],
    overlap: float,
) -> Panoptic:
    """Assign each pixel to the query with the highest score `(Q,)` times mask probability `(H, W)` each.

    As Mask2Former's `panoptic_inference`: void where that query's mask is below 1/2 or the query is dropped.
    One query after the other: 20 of 64 megapixels at once would need 17 GiB.
    """
    if not len(labels):
        return Panoptic(labels.new_zeros(size), [])
    best, areas = scores.new_full(size, -1), torch.zeros_like(labels)
    owner = torch.zeros(size, dtype=torch.int32, device=labels.device)  # 2 q, + 1 inside of its mask
    for q, probability in enumerate(probabilities):
        inside, likely = probability >= 0.5, scores[q] * probability
        owner = torch.where(likely > best, inside.int().add_(2 * q), owner)  # of equal ones, the first
        torch.maximum(best, likely, out=best)
        areas[q] = inside.sum()
    counts = owner.flatten().bincount(minlength=2 * len(labels)).view(-1, 2)
    valid = (counts[:, 1] > 0) & (counts.sum(1) >= overlap * areas)

    segments, ids, stuff = [], [], {}
    for label, probability, keep in zip(labels.tolist(), scores.tolist(), valid.tolist()):
        if keep and label in stuff:
            id = stuff[label]
            old = segments[id - 1]
            segments[id - 1] = old._replace(score=max(old.score, probability))
        elif keep:
            id = len(segments) + 1
            segments.append(PredictedSegment(id, label, probability))
            if not things[label]:
                stuff[label] = id
        ids += 0, id if keep else 0
    return Panoptic(labels.new_tensor(ids)[owner.long()], segments)
