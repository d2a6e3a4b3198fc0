"""Random scale, crop, flip and colours for training, one resize for evaluation: image and labels together.

The recipe is mmsegmentation's, as in VPD (mmseg/datasets/pipelines/transforms.py of its 0.x); where we differ
on purpose, the docstring states it. Images leave as uint8 `(3, H, W)`, RGB, labels as uint8 `(H, W)`, classes
0..K-1 and 255 = ignore. All randomness comes from the generator that the caller gives.

Top to bottom: `normalise` (bytes to the model's floats), `Augment`, `evaluation`, and their parts: the window
that is cropped, resizing, colours.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data import Sample
from images.read import IGNORE, Size, fit

LARGEST_SHARE = 0.75  # of one class in a crop; mmsegmentation's `cat_max_ratio`
TRIES = 10
PAD = 128  # grey; see `Augment`

Window = tuple[int, int, int, int]  # top, left, bottom, right in pixels of the resized image


def normalise(image: Tensor) -> Tensor:
    """uint8 `(B, 3, H, W)` -> float32 in [-1, 1], the range of every image in this repository."""
    return image.float().div_(127.5).sub_(1)


class View(NamedTuple):
    """A training image and its targets; the last three for panoptic samples, of T segments."""

    image: Tensor  # (3, H, W) uint8
    labels: Tensor  # (H, W) uint8, crowds too; 255 = ignore, void and padding
    owners: Tensor | None = None  # (H, W) int16: each pixel's segment as an index into `classes`, or UNOWNED
    classes: Tensor | None = None  # (T,) int64; T may be 0
    size: Size | None = None  # of the image in the top left; the rest is padding


@dataclass(frozen=True)
class Augment:
    """Random scale, crop, flip and colours: image `(3, H, W)` uint8, labels `(H, W)` uint8, (H, W) = crop.

    mmsegmentation's order: resize into `ratio` times the box (short, long), crop, mirror with probability
    1/2, distort the colours, pad on the right and below. Padding is 255 = ignore in the labels and 128 in the
    image: 0.004 in [-1, 1], where mmsegmentation has the 0 that no uint8 gives. Resizing is antialiased and
    centred, where mmcv's is neither (see `resize` and `nearest`).
    """

    crop: Size
    short: int
    long: int
    ratios: ClassVar[tuple[float, float]] = (0.5, 2.0)  # mmsegmentation's `ratio_range`

    def box(self, ratio: float) -> tuple[int, int]:
        """Short and long side that the image is resized into."""
        return int(self.short * ratio), int(self.long * ratio)

    def __call__(self, sample: Sample, ratio: float, rng: np.random.Generator) -> View:
        labels = sample.labels
        size = fit(labels.shape, *self.box(ratio))
        window = choose_window(labels, size, self.crop, rng)
        pixels = resize(sample.image, labels.shape, size, window)
        target = torch.from_numpy(nearest(labels, size, window))
        if coin(rng):
            pixels, target = pixels.flip(2), target.flip(1)
        pixels = photometric(pixels, rng)
        padding = (0, self.crop[1] - target.shape[1], 0, self.crop[0] - target.shape[0])
        return View(F.pad(pixels, padding, value=PAD), F.pad(target, padding, value=IGNORE))


def evaluation(
    image: Image.Image, labels: np.ndarray, short: int | None, long: int | None
) -> tuple[Tensor, Tensor]:
    """Image `(3, h, w)` uint8 resized into the box (not if `short` is None); labels `(H, W)` as they are."""
    size = fit(labels.shape, short, long) if short else labels.shape
    return resize(image, labels.shape, size, (0, 0, *size)), torch.from_numpy(labels)


def model_input(image: Image.Image, size: Size) -> Tensor:
    """The image at `size` (H, W) as the model takes it, `(1, 3, H, W)` in [-1, 1]."""
    return normalise(resize(image, image.size[::-1], size, (0, 0, *size))[None])


def choose_window(labels: np.ndarray, size: Size, crop: Size, rng: np.random.Generator) -> Window:
    """A window in which no class has 75 % of the labelled pixels; after 10 tries any window."""
    for _ in range(TRIES):
        window = draw_window(size, crop, rng)
        count = np.bincount(nearest(labels, size, window).ravel(), minlength=256)[:IGNORE]
        only = window == (0, 0, *size)  # the whole image
        if only or count.max() < LARGEST_SHARE * count.sum():
            return window
    return draw_window(size, crop, rng)


def draw_window(size: Size, crop: Size, rng: np.random.Generator) -> Window:
    """A window of `crop`, anywhere in an image of `size`; all of a smaller image."""
    top, left = (int(rng.integers(max(whole - part, 0) + 1)) for whole, part in zip(size, crop, strict=True))
    return top, left, min(top + crop[0], size[0]), min(left + crop[1], size[1])


def nearest(labels: np.ndarray, size: Size, window: Window) -> np.ndarray:
    """The window of the labels resized to `size`: each pixel takes the label below its centre.

    Computed in whole numbers, so a window equals that part of the whole. mmcv takes the label below the
    pixel's corner, which shifts the labels against the image by up to half a pixel.
    """
    top, left, bottom, right = window
    rows = (2 * np.arange(top, bottom) + 1) * labels.shape[0] // (2 * size[0])
    columns = (2 * np.arange(left, right) + 1) * labels.shape[1] // (2 * size[1])
    return labels[rows][:, columns]


def resize(image: Image.Image, original: Size, size: Size, window: Window) -> Tensor:
    """The window of the RGB image resized to `size`, bilinear and antialiased (mmcv's aliases when it
    shrinks), as uint8 `(3, H, W)`.

    Only the window is computed; Pillow's filter reads beyond its box, so this is that part of the whole, to
    rounding. `original` (H, W) is the image's own size, of which `image` may be a half, a quarter or an
    eighth, rounded up.
    """
    reductions = [f for f in (1, 2, 4, 8) if image.size == (-(-original[1] // f), -(-original[0] // f))]
    assert reductions, f"the image is {image.size}, but (W, H) of its labels is {original[::-1]}"
    y, x = (whole / (shown * reductions[0]) for whole, shown in zip(original, size, strict=True))
    top, left, bottom, right = window
    box = left * x, top * y, min(right * x, image.width), min(bottom * y, image.height)
    shown = image.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=box)
    return torch.from_numpy(np.array(shown)).permute(2, 0, 1).contiguous()


def photometric(image: Tensor, rng: np.random.Generator) -> Tensor:
    """uint8 `(3, H, W)` RGB -> the same, each step with probability 1/2 and cut off at 0 and 255.

    Brightness +-32, contrast 0.5-1.5, saturation 0.5-1.5, hue -36..34 degrees in steps of 2 (-18..17 in
    OpenCV's halves), and the contrast last with probability 1/2. mmsegmentation truncates after every step;
    we round once.
    """
    x = image.float()
    if coin(rng):
        x = x.add_(rng.uniform(-32, 32)).clamp_(0, 255)
    early = coin(rng)
    if early and coin(rng):
        x = x.mul_(rng.uniform(0.5, 1.5)).clamp_(0, 255)
    saturation = rng.uniform(0.5, 1.5) if coin(rng) else 1.0
    hue = int(rng.integers(-18, 18)) if coin(rng) else 0
    if saturation != 1 or hue != 0:
        x = recolour(x, saturation, 2 * hue)
    if not early and coin(rng):
        x = x.mul_(rng.uniform(0.5, 1.5)).clamp_(0, 255)
    return x.round_().to(torch.uint8)


def coin(rng: np.random.Generator) -> bool:
    return rng.random() < 0.5


def recolour(x: Tensor, saturation: float, degrees: float) -> Tensor:
    """Scale the saturation and turn the hue of `(3, H, W)` >= 0 in the HSV hexagon; the value stays."""
    r, g, b = x
    value = x.amax(0)
    chroma = value - x.amin(0)
    unit = chroma.clamp(min=1e-6)
    hue = torch.where(value == g, 2 + (b - r) / unit, 4 + (r - g) / unit)
    hue = torch.where(value == r, (g - b) / unit, hue) + degrees / 60  # in sides of the hexagon
    chroma = torch.minimum(chroma * saturation, value)  # a saturation of at most 1
    away = [(hue + n).remainder_(6) for n in (5, 3, 1)]  # R, G, B are lowest at 1..3 in the middle of 0..4
    return torch.stack([value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1) for k in away])
