"""The decoders of semantic segmentation: the UNet's four feature maps to one class per pixel; their loss.

Semantic FPN (Kirillov et al. 2019, arXiv:1901.02446) and UperNet (Xiao et al. 2018, arXiv:1807.10221), built
as mmsegmentation builds them for the paper's peers: `FPN` + `FPNHead`, and `UPerHead` + `FCNHead`, with
GroupNorm in the place of its SyncBN, so that no number depends on the batch or on how many processes share
it. UperNet equals transformers' `UperNetHead` and `UperNetFCNHead` with that one change
(tests/test_decoders.py).

Top to bottom: what the two share, Semantic FPN, UperNet, their parts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import IGNORE, upsampled_argmax, upsampled_cross_entropy

CHANNELS = (320, 640, 1280, 1280)  # of Stable Diffusion v1.5's feature maps, finest first (`UNet.features`)
POOLED_SIZES = (1, 2, 3, 6)  # of the pyramid pooling (mmsegmentation uper_head.py, `pool_scales`)
AUXILIARY_MAP = 2  # that the auxiliary head reads (mmsegmentation configs/_base_/models/upernet_swin.py)
AUXILIARY_WEIGHT = 0.4  # of its loss (the same file)


class Logits(NamedTuple):
    """What a decoder predicts; the same in training and evaluation."""

    main: Tensor  # (B, K, h, w), the size of the finest feature map
    auxiliary: Tensor | None  # (B, K, h/4, w/4) of UperNet's second head, which serves the loss alone


class SemanticDecoder(nn.Module):
    """The loss and the reading of a prediction, which do not depend on how the logits were made.

    A decoder maps features, four maps `(B, C_i, h_i, w_i)`, finest first, at strides 8, 16, 32, 64, each half
    the size of the one before, to `Logits`. All sizes below are those of the picture that the features saw,
    its padding included.
    """

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        self.channels = tuple(channels)

    def loss(self, prediction: Logits, labels: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Per part, `seg` and UperNet's `aux`: (float32 sum of its weighted cross-entropies, number of pixels
        summed).

        labels `(B, H, W)` int64 in 0..K-1, 255 = ignore. Divide by max(count, 1), the count summed over all
        processes and accumulation steps: then each labelled pixel of the global batch weighs the same.
        mmsegmentation divides by all pixels of each GPU, ignored ones too (losses/cross_entropy_loss.py,
        `avg_non_ignore=False`): on one GPU its loss is ours times the share of labelled pixels.
        """
        total, count = upsampled_cross_entropy(prediction.main, labels)
        losses = {"seg": (total, count)}
        if prediction.auxiliary is not None:
            total, count = upsampled_cross_entropy(prediction.auxiliary, labels)
            losses["aux"] = (AUXILIARY_WEIGHT * total, count)
        return losses

    def counts(self, labels: Tensor) -> dict[str, Tensor]:
        """The counts of `loss`, from the labels alone: an accumulated step needs all of them beforehand."""
        count = (labels != IGNORE).sum()
        return {"seg": count, "aux": count}

    def logits(self, prediction: Logits, size: tuple[int, int]) -> Tensor:
        """`(B, K, H, W)` float32 at `size` = (H, W), interpolated bilinearly."""
        return resize(prediction.main.float(), size)

    def labels(self, prediction: Logits, size: tuple[int, int]) -> Tensor:
        """`(B, H, W)` int64, the most likely class of every pixel at `size` = (H, W)."""
        return upsampled_argmax(prediction.main, size)

    def check(self, features: Sequence[Tensor]) -> None:
        """The border: widths and sizes; maps in a wrong order or of an unpadded picture are refused."""
        widths = tuple(x.shape[1] for x in features)
        assert widths == self.channels, (
            f"the feature maps have {widths} channels, not {self.channels}: give all of them, finest first"
        )
        sizes = [tuple(x.shape[2:]) for x in features]
        h, w = sizes[-1]
        expected = [(h << i, w << i) for i in reversed(range(len(sizes)))]
        assert sizes == expected, (
            f"the feature maps are {sizes}, not each half the one before: "
            "pad the picture to multiples of 64 pixels"
        )


class SemanticFPN(SemanticDecoder):
    """A feature pyramid whose levels are brought to the finest size and summed; 7.4 M parameters at its
    defaults.

    `width` is VPD's 256; mmsegmentation's own default is 128. `dropout` drops whole channels before the
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
    """Pyramid pooling on the coarsest map, a feature pyramid under it, all levels side by side; 38.7 M
    parameters.

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
        # Over PPM's 1x1 map GroupNorm has width/groups values a group; BatchNorm has one at batch 1.
        assert width > groups, (
            f"UperNet has width {width}, but needs at least two channels in each of {groups} groups"
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
        maps = [conv(x) for conv, x in zip(self.fpn_convs, maps)] + [top]  # the top has no convolution here

        finest = torch.cat([resize(x, maps[0].shape[2:]) for x in maps], dim=1)  # (B, 4 width, h, w)
        main = self.classifier(self.fpn_bottleneck(finest))
        return Logits(main, self.auxiliary_head(features[AUXILIARY_MAP]))


def pyramid_conv(in_channels: int, channels: int, kernel: int) -> nn.Conv2d:
    """A convolution of Semantic FPN's pyramid: no norm, no activation, so it has a bias."""
    conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2)
    nn.init.xavier_uniform_(conv.weight)  # mmsegmentation necks/fpn.py, `init_cfg`
    nn.init.zeros_(conv.bias)
    return conv


def scale_head(level: int, width: int, groups: int) -> nn.Sequential:
    """One level of the pyramid to the finest size: `level` times (convolution, twice the size); level 0: one
    convolution.
    """
    steps = []
    for _ in range(max(level, 1)):
        steps.append(conv_norm_relu(width, width, 3, groups))
        if level > 0:
            steps.append(nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=False))
    return nn.Sequential(*steps)


def conv_norm_relu(in_channels: int, channels: int, kernel: int, groups: int) -> nn.Sequential:
    """Convolution (no bias: the norm has one), GroupNorm, ReLU."""
    conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # mmcv conv_module.py
    return nn.Sequential(conv, nn.GroupNorm(groups, channels), nn.ReLU(inplace=True))


def classifier(width: int, classes: int, dropout: float) -> nn.Sequential:
    """Dropout of whole channels, then one linear map per pixel to the class logits."""
    conv = nn.Conv2d(width, classes, 1)
    nn.init.normal_(conv.weight, std=0.01)  # mmsegmentation decode_head.py, `init_cfg`
    nn.init.zeros_(conv.bias)
    return nn.Sequential(nn.Dropout2d(dropout), conv)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """`(B, C, h, w)` -> `(B, C, H, W)` at `size` = (H, W), bilinearly, pixel centres aligned (not the
    corners).
    """
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
