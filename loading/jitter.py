"""Panoptic samples: large-scale jitter and targets for training, pictures with their truth for evaluation.

    stream = PanopticTrainStream(dataset, crop=(640, 640), batch=64, seed=0, rank=0, world=8)
    for batch in stream.batches(position):
        owners = batch.owners.to(device)
        masks = [masks_of(x, len(classes)) for x, classes in zip(owners, batch.classes)]  # b times (T, H, W)

The jitter is Mask2Former's (detectron2, data/transforms/augmentation_impl.py: RandomFlip, ResizeScale,
FixedSizeCrop): mirror with probability 1/2, resize it to fit into the crop times 0.1-2, cut the crop out of
what is larger, pad what is smaller on the right and below with 128. Its colours stay. `size` is what of the
crop is picture: beyond it no loss is to be taken. Masks travel as one map of owners, two bytes a pixel for
any number of segments; `masks_of` makes them on the device. Order, ranks, workers, resumption and files that
cannot be read are stream.py's.

Top to bottom: the jitter, its masks, training, evaluation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from errors import DataError
from images.panoptic import Segment, positions, semantic
from images.read import IGNORE, Size
from loading.augment import PAD, coin, evaluation, nearest, resize, to_tensor
from loading.stream import EvaluationStream, TrainStream, randomness
from panoptic_data import PanopticDataset

SCALES = (0.1, 2.0)  # Mask2Former's MIN_SCALE, MAX_SCALE (Base-COCO-PanopticSegmentation.yaml)
NOBODY = -1  # owns void, crowds and padding


class Jittered(NamedTuple):
    """A training picture of T segments."""

    image: Tensor  # (3, H, W) uint8
    labels: Tensor  # (H, W) uint8 classes, crowds too; 255 = void and padding
    owners: Tensor  # (H, W) int16: the place of the pixel's segment in `classes`, or NOBODY
    classes: Tensor  # (T,) int64; T may be 0
    size: Size  # of the picture in the top left; the rest is padding


def jitter(
    image: Image.Image,
    ids: np.ndarray,
    segments: Sequence[Segment],
    crop: Size,
    rng: np.random.Generator,
    scales: tuple[float, float] = SCALES,
) -> Jittered:
    """Large-scale jitter of a picture with its map of ids to (H, W) = crop.

    Crowds have no owner, and a segment that the crop does not show is left out: Mask2Former keeps it with an
    empty mask, and so asks for what cannot be seen. As in FixedSizeCrop one number places the crop along both
    sides. `rng` should depend on the sample alone (`randomness` in stream.py).
    """
    scale = rng.uniform(*scales)  # the first number drawn: the stream looks at it ahead
    size = fit_into(ids.shape, (crop[0] * scale, crop[1] * scale))
    mirrored, place = coin(rng), rng.random()
    top, left = (round(max(whole - part, 0) * place) for whole, part in zip(size, crop, strict=True))
    height, width = (min(whole, part) for whole, part in zip(size, crop, strict=True))
    if mirrored:  # the crop is placed in the mirrored picture, and cut out of this one
        left = size[1] - left - width
    window = top, left, top + height, left + width

    pixels = to_tensor(resize(image, ids.shape, size, window))
    ids = nearest(ids, size, window)
    seen = set(np.unique(ids).tolist())
    owned = [s for s in segments if not s.crowd and s.id in seen]
    labels = torch.from_numpy(semantic(ids, segments))
    owners = torch.from_numpy(positions(ids, owned).astype(np.int16))
    if mirrored:
        pixels, labels, owners = pixels.flip(2), labels.flip(1), owners.flip(1)
    beyond = (0, crop[1] - width, 0, crop[0] - height)
    return Jittered(
        F.pad(pixels, beyond, value=PAD),
        F.pad(labels, beyond, value=IGNORE),
        F.pad(owners, beyond, value=NOBODY),
        torch.tensor([s.label for s in owned], dtype=torch.int64),
        (height, width),
    )


def fit_into(size: Size, box: tuple[float, float]) -> Size:
    """The largest size of this aspect within a box (height, width), never below 1 (ResizeScale)."""
    ratio = min(box[0] / size[0], box[1] / size[1])
    return max(round(size[0] * ratio), 1), max(round(size[1] * ratio), 1)


def masks_of(owners: Tensor, T: int) -> Tensor:
    """`(T, H, W)` bool, on the device of `owners (H, W)`: they do not overlap, and none has NOBODY's pixels.

    Where a model pads pictures, pad `owners` with NOBODY first.
    """
    return owners == torch.arange(T, device=owners.device, dtype=owners.dtype)[:, None, None]


# ---- training --------------------------------------------------------------------------------------------


class PanopticBatch(NamedTuple):
    """One micro-batch of one rank, b pictures: what `stream.Batch` holds, and the segments."""

    image: Tensor  # (b, 3, H, W) uint8
    labels: Tensor  # (b, H, W) uint8
    owners: Tensor  # (b, H, W) int16
    classes: list[Tensor]  # b times (T,) int64
    sizes: list[Size]
    present: list[list[int]]  # the classes of the whole pictures
    positions: list[int]
    paths: list[str]
    skipped: list[str]


class PanopticItem(NamedTuple):
    """One training sample, as `stream.Item`."""

    image: Tensor
    labels: Tensor
    owners: Tensor
    classes: Tensor
    size: Size
    present: list[int]
    position: int
    path: str
    skipped: list[str]


class PanopticTrainStream(TrainStream):
    """The training samples of one rank, jittered; everything else is `TrainStream`'s."""

    def __init__(
        self,
        dataset: PanopticDataset,
        crop: Size,
        batch: int,
        seed: int,
        scales: tuple[float, float] = SCALES,
        **options,
    ):
        super().__init__(dataset, crop, min(crop), max(crop), batch, seed, **options)
        self.scales = scales

    def sample(self, position: int, epoch: int, index: int, skipped: list[str]) -> PanopticItem:
        scale = randomness(self.seed, epoch, index).uniform(*self.scales)  # what `jitter` will draw first
        box = max(int(self.short * scale), 1), max(int(self.long * scale), 1)
        image, ids, segments = self.dataset.panoptic(index, *box)
        rng = randomness(self.seed, epoch, index)
        jittered = jitter(image, ids, segments, self.crop, rng, self.scales)
        return PanopticItem(*jittered, present(segments), position, self.dataset.path(index), skipped)

    @staticmethod
    def merge(items: list[PanopticItem | DataError]) -> PanopticBatch | DataError:
        for item in items:
            if isinstance(item, DataError):
                return item
        image, labels, owners, *lists, skipped = map(list, zip(*items, strict=True))
        maps = map(torch.stack, (image, labels, owners))
        return PanopticBatch(*maps, *lists, list(chain(*skipped)))


def present(segments: Sequence[Segment]) -> list[int]:
    """The classes of a picture, in order."""
    return sorted({s.label for s in segments})


# ---- evaluation ------------------------------------------------------------------------------------------


class PanopticTruth(NamedTuple):
    """One picture to evaluate: what `stream.Item` holds, and the truth at the picture's own size."""

    image: Tensor  # (3, h, w) uint8, resized into the box
    labels: Tensor  # (H, W) uint8
    present: list[int]
    position: int  # its index
    path: str
    skipped: list[str]
    ids: np.ndarray  # (H, W) int32
    segments: list[Segment]


@dataclass
class PanopticEvaluationStream(EvaluationStream):
    """Pictures resized into a box (not if `short` is None) with their truth at the original size."""

    dataset: PanopticDataset

    def __getitem__(self, i: int) -> PanopticTruth | DataError:
        try:
            image, ids, segments = self.dataset.panoptic(i, self.short, self.long)
        except DataError as error:
            return error
        shown, labels = evaluation(image, semantic(ids, segments), self.short, self.long)
        return PanopticTruth(shown, labels, present(segments), i, self.dataset.path(i), [], ids, segments)
