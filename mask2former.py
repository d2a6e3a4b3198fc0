"""Mask2Former-lite: the UNet's four feature maps to a set of segments, each a class and a mask; its loss.

Masked-attention Mask Transformer (Cheng et al. 2022, arXiv:2112.01527; the paper's Table 4) in plain PyTorch.
Q learned queries x_q ask the picture. After every layer a query predicts

    its class    softmax(W x_q) over the K classes and "no object",
    its mask     m_q(p) = e(x_q) . F(p), one logit per pixel p of the mask features F at stride 4,

and the next layer's cross-attention of query q reads only the pixels where its mask is at least 1/2. All
predictions are trained (deep supervision): one before the first layer, one after each. Segments have no
order, so the loss first matches them to the queries one to one, at the least total cost.

Equal to transformers' `Mask2FormerForUniversalSegmentation` (tests/test_mask2former.py), given its `backbone`
maps, but for three things: the maps come in at strides 8..64 and are brought to 4..32; a matching cost that
is not finite makes the loss nan; padding, where a target says so, draws no points.

Top to bottom: what goes in and out, the decoder, its pixel decoders, deformable attention, the query layers,
the matching and the sampled losses, the reading of a prediction.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from decoders import CHANNELS, SemanticDecoder, resize

Size = tuple[int, int]
Rand = Callable[..., Tensor]  # `rand(*shape, device=)` draws uniformly from [0, 1)

COCO_THINGS = (True,) * 80 + (False,) * 53  # panoptic_coco_categories.json, `isthing`
LEVELS = 3  # of the pixel decoder that queries and pixels attend to: strides 32, 16, 8
SAMPLES = 4  # per head and level, of deformable attention (arXiv:2010.04159)
# Weights and points: Mask2Former configs/coco/panoptic-segmentation/*.yaml, section MODEL.MASK_FORMER.
CLASS_WEIGHT, MASK_WEIGHT, DICE_WEIGHT = 2.0, 5.0, 5.0  # of the loss and of the matching cost alike
SCORE = OVERLAP = 0.8  # least of a segment that is kept (the same files, TEST; ODISE's score is 0)
NO_OBJECT = 0.1  # weight of the queries that no segment is matched to
OVERSAMPLE = 3  # candidates per point of the mask losses,
IMPORTANT = 0.75  # and the share of the points that are the least certain of them


class Target(NamedTuple):
    """The segments of one picture: things one by one, the stuff of a class together; no crowd, no void.

    classes `(T,)` int64 in 0..K-1, masks `(T, H, W)` bool at the size that the features saw. T may be 0, or
    more than there are queries. size: height and width of the picture in the top left, None = all of H, W;
    the rest is padding, in which no loss is taken.
    """

    classes: Tensor
    masks: Tensor
    size: Size | None = None


class Queries(NamedTuple):
    """What the queries say, before the first layer and after each; the same in training and evaluation."""

    classes: tuple[Tensor, ...]  # (B, Q, K+1) logits each; the last class is "no object"
    masks: tuple[Tensor, ...]  # (B, Q, H/4, W/4) logits each

    def picture(self, i: int) -> "Queries":
        """What they say of picture i alone, B = 1."""
        return Queries(*(tuple(x[i : i + 1] for x in part) for part in self))


class PredictedSegment(NamedTuple):
    """One predicted segment."""

    id: int  # in the map of ids
    label: int  # class, 0..K-1
    score: float  # the class's probability; of merged stuff, the highest


class Panoptic(NamedTuple):
    """At most one segment for each pixel: ids `(H, W)` int64 from 1, 0 = void; every id is listed."""

    ids: Tensor
    segments: list[PredictedSegment]


class Instances(NamedTuple):
    """Things, which may overlap, best first: labels `(I,)` int64, scores `(I,)`, masks `(I, H, W)` bool."""

    labels: Tensor
    scores: Tensor
    masks: Tensor


class Mask2Former(nn.Module):
    """Pixel decoder, then `layers` rounds of the queries' masked attention.

    `things`: whether each of the K classes has instances. `points`: sampled per mask in the loss, at most a
    quarter of the image's pixels.
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
            f"width {width} is not a multiple of {heads} heads, or not of 4, which positions need"
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

    check = SemanticDecoder.check  # the border is that of every decoder

    def forward(self, features: Sequence[Tensor]) -> Queries:
        """Four maps `(B, C_i, h_i, w_i)`, finest first, at strides 8, 16, 32, 64 -> what the queries say."""
        self.check(features)
        mask_features, maps = self.pixel_decoder(features)  # (B, C, H/4, W/4), strides 32, 16, 8
        memory = [flatten(x) + level for x, level in zip(maps, self.level_embed)]  # (B, M_i, C)
        places = [sine_positions(x.shape[2:], x.shape[1], x.device) for x in maps]  # (M_i, C)

        x = self.query_features.expand(len(mask_features), -1, -1)  # (B, Q, C)
        classes, masks = self.predict(x, mask_features)
        every = [(classes, masks)]
        for i, layer in enumerate(self.layers):
            level = i % LEVELS
            seen = visible(masks, maps[level].shape[2:])  # (B, Q, M_i)
            x = layer(x, self.query_places, memory[level], places[level], seen)
            classes, masks = self.predict(x, mask_features)
            every.append((classes, masks))
        return Queries(*zip(*every))

    def predict(self, x: Tensor, mask_features: Tensor) -> tuple[Tensor, Tensor]:
        """Queries `(B, Q, C)` -> class logits `(B, Q, K+1)`, mask logits `(B, Q, H/4, W/4)`."""
        x = self.norm(x)
        return self.class_head(x), torch.einsum("BQC,BChw->BQhw", self.mask_head(x), mask_features)

    # ---- the loss

    def loss(
        self, prediction: Queries, targets: Sequence[Target], rand: Rand | Sequence[Rand] = torch.rand
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Per part, class, mask and dice: (float32 sum over all layers of its weighted losses, `counts`).

        Divide by max(count, 1), the count summed over all processes and accumulation steps: then each segment
        of the global batch weighs the same. `rand`, one for all pictures or one for each, draws the points:
        per layer, the last one first, a set for each picture's matching, then those of its matched masks.
        With one for each, no number depends on how the global batch is divided. Where logits are nan or
        infinite, so that nothing can be matched, the sum of `class` is nan: an error in one process would
        leave the others waiting for its gradient.
        """
        self.check_targets(prediction, targets)
        rands = [rand] * len(targets) if callable(rand) else rand
        order = [-1, *range(len(prediction.classes) - 1)]
        parts = []
        with torch.autocast(prediction.masks[-1].device.type, enabled=False):
            for i in order:
                classes, masks = prediction.classes[i].float(), prediction.masks[i].float()
                parts.append(self.layer_loss(classes, masks, targets, rands))
        sums, counts = (sum(x) for x in zip(*parts)), self.counts(targets)
        return {name: (total, counts[name]) for name, total in zip(counts, sums, strict=True)}

    def counts(self, targets: Sequence[Target]) -> dict[str, Tensor]:
        """The counts of `loss`, from the targets alone: float32 scalars.

        Of `class`: the queries, those without a segment times 0.1; of `mask` and `dice`: the segments, those
        beyond the number of queries too (as upstream counts).
        """
        Q = len(self.query_features)
        matched = sum(min(len(target.classes), Q) for target in targets)
        queries = matched + NO_OBJECT * (len(targets) * Q - matched)
        segments = sum(len(target.classes) for target in targets)
        device = targets[0].classes.device
        return {
            name: torch.tensor(float(count), device=device)
            for name, count in (("class", queries), ("mask", segments), ("dice", segments))
        }

    def layer_loss(
        self, classes: Tensor, masks: Tensor, targets: Sequence[Target], rands: Sequence[Rand]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The three weighted sums of one layer: logits `(B, Q, K+1)` and `(B, Q, h, w)`."""
        K, (h, w) = len(self.things), masks.shape[2:]
        points = min(self.points, 4 * h * w)  # h w is a sixteenth of the pixels
        costs = matching_costs(classes, masks, targets, points, rands)
        matches = match(costs)

        wanted = torch.full(classes.shape[:2], K, device=classes.device)  # (B, Q)
        for row, target, (queries, segments) in zip(wanted, targets, matches):
            row[queries] = target.classes[segments]
        weight = classes.new_ones(K + 1)
        weight[K] = NO_OBJECT
        by_class = F.cross_entropy(classes.flatten(0, 1), wanted.flatten(), weight, reduction="sum")
        by_class = by_class + 0 * sum(cost.sum() for cost in costs)  # nan if one is not finite

        found = torch.cat([x[queries] for x, (queries, _) in zip(masks, matches)])  # (T, h, w)
        numbers = [len(queries) for queries, _ in matches]
        shares = torch.cat([real_share(x).expand(n, 1, 2) for x, n in zip(targets, numbers)])

        def rand(T: int, *shape: int, device: torch.device) -> Tensor:
            return torch.cat([draw(n, *shape, device=device) for draw, n in zip(rands, numbers)])

        places = uncertain_points(found.detach(), shares, points, rand)  # (T, points, 2)
        labels = torch.cat(
            [
                sample(target.masks[segments].float(), part)
                for target, (_, segments), part in zip(targets, matches, places.split(numbers))
            ]
        )
        by_mask, by_dice = mask_losses(sample(found, places), labels)
        return CLASS_WEIGHT * by_class, MASK_WEIGHT * by_mask, DICE_WEIGHT * by_dice

    def check_targets(self, prediction: Queries, targets: Sequence[Target]) -> None:
        """The border: one target per picture, of the right types and sizes."""
        B, _, h, w = prediction.masks[-1].shape
        assert len(targets) == B, f"{len(targets)} targets for {B} pictures: give one per picture"
        for classes, masks, _ in targets:
            assert classes.dtype == torch.int64 and masks.dtype == torch.bool, (
                f"a target has {classes.dtype} classes and {masks.dtype} masks: give int64 and bool"
            )
            assert masks.shape == (len(classes), 4 * h, 4 * w), (
                f"a target has masks {tuple(masks.shape)}: give {(len(classes), 4 * h, 4 * w)}, "
                "one per class, padded as the picture"
            )

    # ---- reading a prediction; all sizes are (H, W)

    def panoptic(
        self,
        prediction: Queries,
        padded: Size,
        real: Size | None = None,
        size: Size | None = None,
        score: float = SCORE,
        overlap: float = OVERLAP,
    ) -> list[Panoptic]:
        """The segments of each picture, at `size`.

        padded: the size that the features saw; real: its top left part without padding, by default all;
        size: by default `real`. Queries whose class is less likely than `score` are dropped, and those who
        keep less than `overlap` of their mask (Mask2Former's 0.8 and 0.8; ODISE's score is 0).
        """
        return [
            panoptic_segments(classes, masks, self.things, (padded, real, size), score, overlap)
            for classes, masks in zip(prediction.classes[-1].float(), prediction.masks[-1].float())
        ]

    def instances(
        self,
        prediction: Queries,
        padded: Size,
        real: Size | None = None,
        size: Size | None = None,
        top: int = 100,
    ) -> list[Instances]:
        """The things among the `top` most likely (query, class) pairs of each picture; sizes as `panoptic`'s.

        Scores are class probability times mean probability of the mask's pixels.
        """
        return [
            thing_instances(classes, masks, self.things, (padded, real, size), top)
            for classes, masks in zip(prediction.classes[-1].float(), prediction.masks[-1].float())
        ]

    def semantic(
        self, prediction: Queries, padded: Size, real: Size | None = None, size: Size | None = None
    ) -> Tensor:
        """`(B, K, H, W)` float32: per class, the sum over queries of its probability times the mask's."""
        classes = prediction.classes[-1].float().softmax(-1)[..., :-1]
        masks = fit(prediction.masks[-1].float(), padded, real, size).sigmoid()
        with torch.autocast(masks.device.type, enabled=False):
            return torch.einsum("BQK,BQHW->BKHW", classes, masks)

    def logits(self, prediction: Queries, size: Size) -> Tensor:
        """The logarithm of `semantic` at `size`: its softmax is the share of each class."""
        return self.semantic(prediction, size).clamp_(min=torch.finfo(torch.float32).tiny).log_()

    def labels(self, prediction: Queries, size: Size) -> Tensor:
        """`(B, H, W)` int64, the strongest class of every pixel at `size`."""
        return self.semantic(prediction, size).argmax(1)


# ---- the pixel decoders: features -> mask features (B, C, H/4, W/4) and maps at strides 32, 16, 8


class DeformablePixelDecoder(nn.Module):
    """Three maps whose pixels attend to each other by deformable attention; the finest joins as in a pyramid.

    Float32 under autocast too: bfloat16 has no room for a place within a pixel (upstream does the same).
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
            places = torch.cat(
                [sine_positions(s, x.shape[2], x.device) + e for s, e in zip(sizes, self.level_embed)]
            )
            centres = torch.cat([pixel_centres(size, x.device) for size in sizes])  # (N, 2)
            for layer in self.layers:
                x = layer(x, places.to(x.dtype), centres, sizes)

            pixels = x.split([h * w for h, w in sizes], dim=1)
            maps = [rearrange(x, "B (h w) C -> B C h w", h=h) for x, (h, _) in zip(pixels, sizes)]
            finest = self.lateral(finest)  # (B, C, H/4, W/4)
            finest = self.output(finest + resize(maps[-1], finest.shape[2:]))
            return self.mask_projection(finest), maps


def lateral(in_channels: int, width: int, groups: int, bias: bool = False) -> nn.Sequential:
    """To the common width and twice the size: strides 8..64 become 4..32.

    Bilinear interpolation and a 1x1 convolution commute, so the convolution goes first, on a quarter of the
    pixels.
    """
    conv = xavier(nn.Conv2d(in_channels, width, 1, bias=bias))
    twice = nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=False)
    return nn.Sequential(conv, twice, nn.GroupNorm(groups, width))


def output(width: int, groups: int) -> nn.Sequential:
    conv = xavier(nn.Conv2d(width, width, 3, padding=1, bias=False))
    return nn.Sequential(conv, nn.GroupNorm(groups, width), nn.ReLU(inplace=True))


def flatten(x: Tensor) -> Tensor:
    return rearrange(x, "B C h w -> B (h w) C")


def sine_positions(size: Size, width: int, device: torch.device) -> Tensor:
    """`(h w, C)` float32: where each pixel is; half of the channels tell y, half x (arXiv:2005.12872).

    Per axis, sine and cosine in turn of 2 pi (i + 1) / n over powers of 10,000.
    """
    half = width // 2
    waves = 10_000 ** (2 * (torch.arange(half, device=device) // 2) / half)

    def axis(n: int) -> Tensor:
        places = torch.arange(1, n + 1, device=device) / (n + 1e-6) * 2 * math.pi
        angles = places[:, None] / waves  # (n, C/2)
        return torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=2).flatten(1)

    h, w = size
    y, x = axis(h)[:, None].expand(-1, w, -1), axis(w)[None].expand(h, -1, -1)
    return torch.cat([y, x], dim=2).flatten(0, 1)


def pixel_centres(size: Size, device: torch.device) -> Tensor:
    """`(h w, 2)` float32: x and y of every pixel's centre, in 0..1."""
    h, w = size
    y, x = (torch.arange(h, device=device) + 0.5) / h, (torch.arange(w, device=device) + 0.5) / w
    return torch.stack([x.expand(h, w), y[:, None].expand(h, w)], dim=2).flatten(0, 1)


class DeformableLayer(nn.Module):
    """Every pixel reads a few places of all levels around itself; then a two-layer network; norms after."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = DeformableAttention(width, heads)
        self.attention_norm = nn.LayerNorm(width)
        self.ffn = ffn(width, 4 * width)  # 1,024: upstream ignores its own configuration's 2,048
        self.ffn_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, places: Tensor, centres: Tensor, sizes: Sequence[Size]) -> Tensor:
        x = self.attention_norm(x + self.attention(x, places, centres, sizes))
        return self.ffn_norm(x + self.ffn(x))


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Zhu et al. 2021, arXiv:2010.04159).

    Where an attention compares a query with all keys, here the query itself says, for each head and level, at
    which four offsets from its own place it reads, and with which weights.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.sampling_offsets = nn.Linear(width, heads * LEVELS * SAMPLES * 2)
        self.attention_weights = nn.Linear(width, heads * LEVELS * SAMPLES)
        self.value_proj = xavier(nn.Linear(width, width))
        self.output_proj = xavier(nn.Linear(width, width))

        # At the start head k looks in the direction 2 pi k / n, to the squares at distance 1, 2, 3, 4.
        angles = torch.arange(heads) * 2 * math.pi / heads
        rays = torch.stack([angles.cos(), angles.sin()], dim=1)
        rays = rays / rays.abs().amax(dim=1, keepdim=True)  # (n, 2)
        steps = rays[:, None, None] * torch.arange(1, SAMPLES + 1)[:, None]  # (n, 1, P, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(steps.expand(-1, LEVELS, -1, -1).flatten())
        for x in (self.sampling_offsets.weight, *self.attention_weights.parameters()):
            nn.init.zeros_(x)

    def forward(self, x: Tensor, places: Tensor, centres: Tensor, sizes: Sequence[Size]) -> Tensor:
        """x `(B, N, C)`, the pixels of all levels; places `(N, C)`; centres `(N, 2)` -> `(B, N, C)`."""
        query = x + places
        shape = {"n": self.heads, "L": LEVELS, "P": SAMPLES}
        offsets = rearrange(self.sampling_offsets(query), "B N (n L P xy) -> B N n L P xy", **shape, xy=2)
        weights = rearrange(self.attention_weights(query), "B N (n i) -> B N n i", n=self.heads).softmax(-1)
        weights = weights.unflatten(-1, (LEVELS, SAMPLES))
        pixels = torch.tensor([(w, h) for h, w in sizes], device=x.device)  # of each level, to measure in
        points = centres[:, None, None, None] + offsets / pixels[:, None]
        value = rearrange(self.value_proj(x), "B N (n d) -> B N n d", n=self.heads)
        return self.output_proj(deformable_attention(value, sizes, points, weights))


def deformable_attention(value: Tensor, sizes: Sequence[Size], points: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of values read, bilinearly, at points: `(B, N, C)`.

    value `(B, M, n, d)`, M the pixels of all levels, whose sizes are (h, w); points `(B, N, n, L, P, 2)` x
    and y, 0..1 from edge to edge, outside is 0; weights `(B, N, n, L, P)`.
    """
    B = len(value)
    total = 0
    for level, pixels in enumerate(value.split([h * w for h, w in sizes], dim=1)):
        pixels = rearrange(pixels, "B (h w) n d -> (B n) d h w", h=sizes[level][0])
        grid = rearrange(2 * points[:, :, :, level] - 1, "B N n P xy -> (B n) P N xy")
        weight = rearrange(weights[:, :, :, level], "B N n P -> (B n) 1 P N").contiguous()  # or else slow
        read = F.grid_sample(pixels.to(grid.dtype), grid, align_corners=False)  # (B n, d, P, N)
        total = total + (read * weight).sum(2)
    return rearrange(total.to(value.dtype), "(B n) d N -> B N (n d)", B=B)


# ---- the queries


class QueryLayer(nn.Module):
    """Masked cross-attention to the picture, self-attention, MLP, each followed by its norm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.cross_attention = Attention(width, heads)
        self.cross_norm = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads)
        self.self_norm = nn.LayerNorm(width)
        self.ffn = ffn(width, 8 * width)
        self.ffn_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, x_places: Tensor, memory: Tensor, places: Tensor, seen: Tensor) -> Tensor:
        """x `(B, Q, C)`, memory `(B, M, C)`, their places `(Q, C)` and `(M, C)`, seen `(B, Q, M)` bool."""
        key = memory + places.to(memory.dtype)
        x = self.cross_norm(x + self.cross_attention(x + x_places, key, memory, seen))
        query = x + x_places
        x = self.self_norm(x + self.self_attention(query, query, x))
        return self.ffn_norm(x + self.ffn(x))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        # nn.MultiheadAttention draws q, k and v as one matrix (3C, C): narrower than three (C, C) by sqrt(2).
        self.q = xavier(nn.Linear(width, width), gain=2**-0.5)
        self.k = xavier(nn.Linear(width, width), gain=2**-0.5)
        self.v = xavier(nn.Linear(width, width), gain=2**-0.5)
        self.out = xavier(nn.Linear(width, width))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None) -> Tensor:
        """`(B, N, C), (B, M, C), (B, M, C)` and seen `(B, N, M)` bool, None = all -> `(B, N, C)`."""
        q, k, v = (
            rearrange(linear(x), "B N (n d) -> B n N d", n=self.heads)
            for linear, x in ((self.q, query), (self.k, key), (self.v, value))
        )
        x = F.scaled_dot_product_attention(q, k, v, None if seen is None else seen[:, None])
        return self.out(rearrange(x, "B n N d -> B N (n d)"))


def visible(masks: Tensor, size: Size) -> Tensor:
    """Which pixels of a level each query may read, `(B, Q, h w)` bool: those in its mask `(B, Q, H/4, W/4)`.

    A query whose mask is empty there reads everything. Nothing is learned through this choice.
    """
    seen = resize(masks.detach(), size).flatten(2) >= 0
    return seen | ~seen.any(dim=2, keepdim=True)


def ffn(width: int, hidden: int) -> nn.Sequential:
    first, second = nn.Linear(width, hidden), nn.Linear(hidden, width)
    for linear in (first, second):
        nn.init.xavier_uniform_(linear.weight)
    return nn.Sequential(first, nn.ReLU(inplace=True), second)


def xavier(module: nn.Module, gain: float = 1.0) -> nn.Module:
    """Xavier-uniform weights, biases 0."""
    nn.init.xavier_uniform_(module.weight, gain)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


# ---- matching and the sampled losses


@torch.no_grad()
def matching_costs(
    classes: Tensor,
    masks: Tensor,
    targets: Sequence[Target],
    points: int,
    rand: Rand | Sequence[Rand] = torch.rand,
) -> list[Tensor]:
    """What it costs in each picture to take a query for a segment: `(Q, T)` float32.

    2 (-probability of the class) + 5 (cross-entropy of the masks) + 5 (dice of the masks), the masks read at
    `points` random places, the same for all pairs. Float32 logits `(B, Q, K+1)` and `(B, Q, h, w)`; `rand` as
    in `Mask2Former.loss`.
    """
    costs = []
    rands = [rand] * len(targets) if callable(rand) else rand
    for class_logits, mask_logits, target, draw in zip(classes, masks, targets, rands):
        places = draw(1, points, 2, device=masks.device) * real_share(target)
        logits = sample(mask_logits, places)  # (Q, P)
        labels = sample(target.masks.float(), places)  # (T, P)

        by_class = -class_logits.softmax(-1)[:, target.classes]  # (Q, T)
        # -t log p - (1 - t) log(1 - p) = softplus(x) - t x
        by_mask = (F.softplus(logits).sum(1, keepdim=True) - logits @ labels.T) / points
        p = logits.sigmoid()
        by_dice = 1 - (2 * p @ labels.T + 1) / (p.sum(1, keepdim=True) + labels.sum(1) + 1)
        costs.append(CLASS_WEIGHT * by_class + MASK_WEIGHT * by_mask + DICE_WEIGHT * by_dice)

    return costs


def match(costs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Per picture, the queries and the segments that belong together, min(Q, T) of each, int64.

    The assignment with the least sum of its costs `(Q, T)`; one that is not finite counts as 0.
    """
    every = torch.cat(list(costs), dim=1).cpu()  # the one wait for the device
    matches = []
    for cost in every.nan_to_num(0, 0, 0).split([x.shape[1] for x in costs], dim=1):
        pairs = linear_sum_assignment(cost.numpy())
        matches.append(tuple(torch.from_numpy(x).to(costs[0].device) for x in pairs))
    return matches


def uncertain_points(logits: Tensor, shares: Tensor, points: int, rand: Rand) -> Tensor:
    """Where the losses of each mask are taken, `(T, points, 2)`: mostly where its logit is nearest to 0.

    Of 3 x points random places the 0.75 x points least certain ones, and the rest anew (PointRend,
    arXiv:1912.08193). logits `(T, h, w)`; shares `(T, 1, 2)`, see `real_share`.
    """
    T, important = len(logits), int(IMPORTANT * points)
    places = rand(T, OVERSAMPLE * points, 2, device=logits.device) * shares
    best = sample(logits, places).abs().topk(important, largest=False, sorted=False).indices
    places = places.gather(1, best[..., None].expand(-1, -1, 2))
    return torch.cat([places, rand(T, points - important, 2, device=logits.device) * shares], dim=1)


def real_share(target: Target) -> Tensor:
    """`(2,)`: the share of width and of height that is no padding."""
    H, W = target.masks.shape[1:]
    h, w = target.size or (H, W)
    return torch.tensor([w / W, h / H], device=target.masks.device)


def sample(maps: Tensor, places: Tensor) -> Tensor:
    """Maps `(R, h, w)` read bilinearly at places `(R, P, 2)`, or `(1, P, 2)` for all: `(R, P)`.

    Places are x and y, 0..1 from edge to edge; outside is 0.
    """
    grid = 2 * places[:, None] - 1
    if len(places) == len(maps):
        return F.grid_sample(maps[:, None], grid, align_corners=False)[:, 0, 0]
    return F.grid_sample(maps[None], grid, align_corners=False)[0, :, 0]


def mask_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over masks of mean cross-entropy and of dice loss, 1 - (2 sum pt + 1) / (sum p + sum t + 1).

    Both arguments `(T, P)`; labels in 0..1.
    """
    by_mask = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1).sum()
    p = logits.sigmoid()
    by_dice = 1 - (2 * (p * labels).sum(1) + 1) / (p.sum(1) + labels.sum(1) + 1)
    return by_mask, by_dice.sum()


# ---- reading one picture: class logits (Q, K+1), mask logits (Q, h, w)


def fit(masks: Tensor, padded: Size, real: Size | None, size: Size | None) -> Tensor:
    """Mask logits `(B, Q, h, w)` at the size that the features saw, without its padding, then at `size`."""
    real = real or padded
    masks = resize(masks, padded)[..., : real[0], : real[1]]
    return masks if size in (None, real) else resize(masks, size)


def panoptic_segments(
    classes: Tensor,
    masks: Tensor,
    things: Sequence[bool],
    sizes: tuple[Size, Size | None, Size | None],
    score: float,
    overlap: float,
) -> Panoptic:
    """As Mask2Former's `panoptic_inference`: a pixel goes to the query of the highest score x probability.

    It stays void where that query's own mask is below 1/2, and where the query is dropped.
    """
    scores, labels = classes.softmax(-1).max(-1)
    kept = (labels != len(things)) & (scores > score)
    scores, labels = scores[kept], labels[kept]
    probabilities = fit(masks[kept, None], *sizes)[:, 0].sigmoid()  # (Q', H, W)
    if not len(labels):
        return Panoptic(labels.new_zeros(probabilities.shape[1:]), [])
    owner = (scores[:, None, None] * probabilities).argmax(0)  # (H, W)
    inside = probabilities >= 0.5
    hit = inside.gather(0, owner[None])[0]  # (H, W): the owner's mask holds the pixel
    owned, drawn = (x.bincount(minlength=len(labels)) for x in (owner.flatten(), owner[hit]))
    whole = inside.sum(dim=(1, 2))
    valid = (drawn > 0) & (owned >= overlap * whole)

    segments, numbers, stuff = [], [], {}
    for label, probability, good in zip(labels.tolist(), scores.tolist(), valid.tolist()):
        if good and label in stuff:
            number = stuff[label]
            old = segments[number - 1]
            segments[number - 1] = old._replace(score=max(old.score, probability))
        elif good:
            number = len(segments) + 1
            segments.append(PredictedSegment(number, label, probability))
            if not things[label]:
                stuff[label] = number
        numbers.append(number if good else 0)
    return Panoptic(owner.new_tensor(numbers)[owner] * hit, segments)


def thing_instances(
    classes: Tensor,
    masks: Tensor,
    things: Sequence[bool],
    sizes: tuple[Size, Size | None, Size | None],
    top: int,
) -> Instances:
    """As Mask2Former's `instance_inference`: a query may give several classes, each with the same mask."""
    scores = classes.softmax(-1)[:, :-1].flatten()  # (Q K,)
    scores, pairs = scores.topk(min(top, len(scores)))
    queries, labels = pairs // len(things), pairs % len(things)
    thing = torch.tensor(things, device=labels.device)[labels]
    scores, queries, labels = scores[thing], queries[thing], labels[thing]
    logits = fit(masks[queries, None], *sizes)[:, 0]
    inside = logits > 0
    certainty = (logits.sigmoid() * inside).sum(dim=(1, 2)) / (inside.sum(dim=(1, 2)) + 1e-6)
    scores, order = (scores * certainty).sort(descending=True)
    return Instances(labels[order], scores, inside[order])
