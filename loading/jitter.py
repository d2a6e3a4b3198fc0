"""Large-scale jitter, the augmentation of panoptic training, and the masks of its segments.

Mask2Former's (detectron2, data/transforms/augmentation_impl.py: RandomFlip, ResizeScale, FixedSizeCrop):
mirror with probability 1/2, resize to fit into the crop times 0.1-2, cut the crop out of what is larger, pad
what is smaller on the right and below with 128. Colours stay. Masks travel as one map of owners, two bytes a
pixel for any number of segments; `masks_of` expands them on the device.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import Sample
from images.panoptic import positions
from images.read import IGNORE, Size
from loading.augment import PAD, View, coin, nearest, resize

SCALES = (0.1, 2.0)  # Mask2Former's MIN_SCALE, MAX_SCALE (Base-COCO-PanopticSegmentation.yaml)
UNOWNED = -1  # the owner of void, crowds and padding


@dataclass(frozen=True)
class Jitter:
    """Large-scale jitter of a sample with segments to (H, W) = crop.

    Crowds own no pixel, and a segment outside of the crop is dropped: Mask2Former keeps it with an empty
    mask, and so asks for what the image does not show. As in FixedSizeCrop one number places the crop along
    both sides.
    """

    crop: Size
    ratios: tuple[float, float] = SCALES

    def box(self, ratio: float) -> tuple[int, int]:
        """Short and long side that the image is resized into."""
        return max(int(min(self.crop) * ratio), 1), max(int(max(self.crop) * ratio), 1)

    def __call__(self, sample: Sample, ratio: float, rng: np.random.Generator) -> View:
        crop, ids = self.crop, sample.ids
        size = fit_into(ids.shape, (crop[0] * ratio, crop[1] * ratio))
        mirrored, place = coin(rng), rng.random()
        top, left = (round(max(whole - part, 0) * place) for whole, part in zip(size, crop, strict=True))
        height, width = (min(whole, part) for whole, part in zip(size, crop, strict=True))
        if mirrored:  # the crop is placed in the mirrored image, and cut out of this one
            left = size[1] - left - width
        window = top, left, top + height, left + width

        pixels = resize(sample.image, ids.shape, size, window)
        ids = nearest(ids, size, window)
        visible = set(np.unique(ids).tolist())
        owned = [s for s in sample.segments if not s.crowd and s.id in visible]
        labels = torch.from_numpy(nearest(sample.labels, size, window))
        owners = torch.from_numpy(positions(ids, owned).astype(np.int16))
        if mirrored:
            pixels, labels, owners = pixels.flip(2), labels.flip(1), owners.flip(1)
        padding = (0, crop[1] - width, 0, crop[0] - height)
        return View(
            F.pad(pixels, padding, value=PAD),
            F.pad(labels, padding, value=IGNORE),
            F.pad(owners, padding, value=UNOWNED),
            torch.tensor([s.label for s in owned], dtype=torch.int64),
            (height, width),
        )


def fit_into(size: Size, box: tuple[float, float]) -> Size:
    """The largest size of this aspect within a box (height, width), never below 1 (ResizeScale)."""
    ratio = min(box[0] / size[0], box[1] / size[1])
    return max(round(size[0] * ratio), 1), max(round(size[1] * ratio), 1)


def masks_of(owners: Tensor, T: int) -> Tensor:
    """`(T, H, W)` bool, on the device of `owners (H, W)`: they do not overlap, and none has UNOWNED pixels.

    Where a model pads images, pad `owners` with UNOWNED first.
    """
    return owners == torch.arange(T, device=owners.device, dtype=owners.dtype)[:, None, None]
