"""The decoders of semantic segmentation: from the UNet's four feature maps to class logits; their loss.

Semantic FPN (Kirillov et al. 2019, arXiv:1901.02446) and UperNet (Xiao et al. 2018, arXiv:1807.10221), built
as in mmsegmentation: `FPN` + `FPNHead`, and `UPerHead` + `FCNHead`, with GroupNorm instead of SyncBN, so that
results do not depend on the batch or the number of processes. UperNet equals transformers' `UperNetHead` and
`UperNetFCNHead` except for this change (tests/test_decoders.py).

Top to bottom: the common base class, Semantic FPN, UperNet, their parts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import IGNORE, upsampled_argmax, upsampled_cross_entropy

CHANNELS = (320, 640, 1280, 1280)  # of Stable Diffusion v1.5's feature maps, finest first (`UNet.features`)
POOLED_SIZES = (1, 2, 3, 6)  # of pyramid pooling (mmsegmentation uper_head.py, `pool_scales`)
AUXILIARY_MAP = 2  # the auxiliary head's input (mmsegmentation configs/_base_/models/upernet_swin.py)
AUXILIARY_WEIGHT = 0.4  # of the auxiliary loss (the same file)


class Logits(NamedTuple):
    """The prediction of a decoder; the same in training and evaluation."""

    main: Tensor  # (B, K, h, w), the size of the finest feature map
    auxiliary: Tensor | None  # (B, K, h/4, w/4) of UperNet's auxiliary head, for the loss only


class SemanticDecoder(nn.Module):
    """Loss, logits and labels of a prediction, common to both decoders.

    `forward` maps four feature maps `(B, C_i, h_i, w_i)`, finest first, at strides 8, 16, 32, 64, each half
    the size of the previous one, to `Logits`. All image sizes below include padding.
    """

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        self.channels = tuple(channels)

    def loss(self, prediction: Logits, labels: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return (float32 weighted sum of cross-entropies, number of pixels) of `seg` and of UperNet's `aux`.

        labels `(B, H, W)` int64 in 0..K-1, 255 = ignore. The caller divides by max(count, 1), the count
        summed over all processes and accumulation steps, so that each labelled pixel of the global batch has
        the same weight. mmsegmentation divides by all pixels of each GPU, ignored ones too
        (losses/cross_entropy_loss.py, `avg_non_ignore=False`): on one GPU its loss is ours times the fraction
        of labelled pixels.
        """
        total, count = upsampled_cross_entropy(prediction.main, labels)
        losses = {"seg": (total, count)}
        if prediction.auxiliary is not None:
            total, count = upsampled_cross_entropy(prediction.auxiliary, labels)
            losses["aux"] = (AUXILIARY_WEIGHT * total, count)
        return losses

    def counts(self, labels: Tensor) -> dict[str, Tensor]:
        """The counts of `loss` from the labels only, which gradient accumulation needs beforehand."""
        count = (labels != IGNORE).sum()
        return {"seg": count, "aux": count}

    def logits(self, prediction: Logits, size: tuple[int, int]) -> Tensor:
        """Upsample bilinearly to `size` = (H, W): `(B, K, H, W)` float32."""
        return resize(prediction.main.float(), size)

    def labels(self, prediction: Logits, size: tuple[int, int]) -> Tensor:
        """The most likely class of each pixel at `size` = (H, W): `(B, H, W)` int64."""
        return upsampled_argmax(prediction.main, size)

    def check(self, features: Sequence[Tensor]) -> None:
        """Check channels and sizes: the order of the maps, and that the image was padded."""
        widths = tuple(x.shape[1] for x in features)
        assert widths == self.channels, (
            f"the feature maps have {widths} channels, not {self.channels}: pass all of them, finest first"
        )
        sizes = [tuple(x.shape[2:]) for x in features]
        h, w = sizes[-1]
        expected = [(h << i, w << i) for i in reversed(range(len(sizes)))]
        assert sizes == expected, (
            f"the feature maps are {sizes}, not each half the previous one: "
            "pad the image to multiples of 64 pixels"
        )


class SemanticFPN(SemanticDecoder):
    """A feature pyramid whose levels are upsampled to the finest one and summed; 7.4 M parameters by default.

    `width` 256 is VPD's; mmsegmentation's default is 128. `dropout` drops whole channels before the
    classifier.
    """

    def __init__(
        self,
        channels: Sequence[int] = CHANNELS,
        classes: int = 150,
        width: int = 256,
        groups: int = 32,
        dropout: float = 0.1,
    ):
        super().__init__(channels)
        self.lateral_convs = nn.ModuleList(pyramid_conv(x, width, 1) for x in channels)
        self.fpn_convs = nn.ModuleList(pyramid_conv(width, width, 3) for _ in channels)
        self.scale_heads = nn.ModuleList(scale_head(level, width, groups) for level in range(len(channels)))
        self.classifier = classifier(width, classes, dropout)

    def forward(self, features: Sequence[Tensor]) -> Logits:
        self.check(features)
        maps = [conv(x) for conv, x in zip(self.lateral_convs, features)]  # (B, width, h_i, w_i)
        for i in reversed(range(len(maps) - 1)):
            maps[i] = maps[i] + F.interpolate(maps[i + 1], scale_factor=2.0, mode="nearest")
        maps = [conv(x) for conv, x in zip(self.fpn_convs, maps)]

        finest = sum(head(x) for head, x in zip(self.scale_heads, maps))  # (B, width, h, w)
        return Logits(self.classifier(finest), None)


class UperNet(SemanticDecoder):
    """Pyramid pooling on the coarsest map, a feature pyramid, all levels concatenated; 38.7 M parameters.

    An auxiliary head on the third map helps training. `dropout` drops whole channels before both classifiers.
    """

    def __init__(
        self,
        channels: Sequence[int] = CHANNELS,
        classes: int = 150,
        width: int = 512,
        auxiliary_width: int = 256,
        groups: int = 32,
        dropout: float = 0.1,
    ):
        super().__init__(channels)
        # On the pooled 1x1 map a group has width/groups values: GroupNorm needs at least two.
        assert width > groups, (
            f"width {width} is too small: UperNet needs at least two channels in each of {groups} groups"
        )
        *finer, coarsest = channels
        self.pyramid_pooling = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), conv_norm_relu(coarsest, width, 1, groups))
            for size in POOLED_SIZES
        )
        self.bottleneck = conv_norm_relu(coarsest + len(POOLED_SIZES) * width, width, 3, groups)
        self.lateral_convs = nn.ModuleList(conv_norm_relu(x, width, 1, groups) for x in finer)
        self.fpn_convs = nn.ModuleList(conv_norm_relu(width, width, 3, groups) for _ in finer)
        self.fpn_bottleneck = conv_norm_relu(len(channels) * width, width, 3, groups)
        self.classifier = classifier(width, classes, dropout)
        self.auxiliary_head = nn.Sequential(
            conv_norm_relu(channels[AUXILIARY_MAP], auxiliary_width, 3, groups),
            classifier(auxiliary_width, classes, dropout),
        )

    def forward(self, features: Sequence[Tensor]) -> Logits:
        self.check(features)
        *finer, coarsest = features
        pooled = [resize(pool(coarsest), coarsest.shape[2:]) for pool in self.pyramid_pooling]
        top = self.bottleneck(torch.cat([coarsest, *pooled], dim=1))  # (B, width, h/8, w/8)

        maps = [conv(x) for conv, x in zip(self.lateral_convs, finer)] + [top]
        for i in reversed(range(len(finer))):
            maps[i] = maps[i] + resize(maps[i + 1], maps[i].shape[2:])
        maps = [conv(x) for conv, x in zip(self.fpn_convs, maps)] + [top]  # the top level has none

        finest = torch.cat([resize(x, maps[0].shape[2:]) for x in maps], dim=1)  # (B, 4 width, h, w)
        main = self.classifier(self.fpn_bottleneck(finest))
        return Logits(main, self.auxiliary_head(features[AUXILIARY_MAP]))


def pyramid_conv(in_channels: int, channels: int, kernel: int) -> nn.Conv2d:
    """A convolution of Semantic FPN's pyramid, with bias, without norm and activation."""
    conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2)
    nn.init.xavier_uniform_(conv.weight)  # mmsegmentation necks/fpn.py, `init_cfg`
    nn.init.zeros_(conv.bias)
    return conv


def scale_head(level: int, width: int, groups: int) -> nn.Sequential:
    """Upsample one level: `level` times (convolution, double size); level 0: one convolution."""
    steps = []
    for _ in range(max(level, 1)):
        steps.append(conv_norm_relu(width, width, 3, groups))
        if level > 0:
            steps.append(nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=False))
    return nn.Sequential(*steps)


def conv_norm_relu(in_channels: int, channels: int, kernel: int, groups: int) -> nn.Sequential:
    """Convolution without bias, GroupNorm, ReLU."""
    conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # mmcv conv_module.py
    return nn.Sequential(conv, nn.GroupNorm(groups, channels), nn.ReLU(inplace=True))


def classifier(width: int, classes: int, dropout: float) -> nn.Sequential:
    """Dropout of whole channels, then a 1x1 convolution to the class logits."""
    conv = nn.Conv2d(width, classes, 1)
    nn.init.normal_(conv.weight, std=0.01)  # mmsegmentation decode_head.py, `init_cfg`
    nn.init.zeros_(conv.bias)
    return nn.Sequential(nn.Dropout2d(dropout), conv)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize `(B, C, h, w)` bilinearly to `size` = (H, W), aligning pixel centres, not corners."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
