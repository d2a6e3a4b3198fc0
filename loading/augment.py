"""Random scale, crop, flip and colours for training, one resize for evaluation: image and labels together.

The recipe is mmsegmentation's, as in VPD (mmseg/datasets/pipelines/transforms.py of its 0.x); where we differ
on purpose, the docstring states it. Images leave as uint8 `(3, H, W)`, RGB, labels as uint8 `(H, W)`, classes
0..K-1 and 255 = ignore. All randomness comes from the generator that the caller gives.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from PIL import Image
from torch import Tensor

from data import Sample
from images.read import IGNORE, Size, fit, histogram

LARGEST_SHARE = 0.75  # of one class in a crop; mmsegmentation's `cat_max_ratio`
TRIES = 10
RATIOS = (0.5, 2.0)  # of the resized image to the box; mmsegmentation's `ratio_range`
STRIP = 64  # rows of a crop whose colours are distorted at once: larger arrays leave the cache, and the heap
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
    ratios: tuple[float, float] = RATIOS
    colours: bool = True  # whether they are distorted

    def box(self, ratio: float) -> tuple[int, int]:
        """Short and long side that the image is resized into."""
        return int(self.short * ratio), int(self.long * ratio)

    def __call__(self, sample: Sample, ratio: float, rng: Generator) -> View:
        labels = sample.labels
        size = fit(labels.shape, *self.box(ratio))
        window, cut = choose_window(labels, size, self.crop, rng)
        pixels = to_tensor(resize(sample.image, labels.shape, size, window))
        target = torch.from_numpy(cut)
        if coin(rng):
            pixels, target = pixels.flip(2), target.flip(1)
        pixels = photometric(pixels, rng) if self.colours else pixels
        padding = (0, self.crop[1] - target.shape[1], 0, self.crop[0] - target.shape[0])
        return View(F.pad(pixels, padding, value=PAD), F.pad(target, padding, value=IGNORE))


def evaluation(
    image: Image.Image, labels: np.ndarray, short: int | None, long: int | None
) -> tuple[Tensor, Tensor]:
    """Image `(3, h, w)` uint8 resized into the box (not if `short` is None); labels `(H, W)` as they are."""
    size = fit(labels.shape, short, long) if short else labels.shape
    return to_tensor(resize(image, labels.shape, size, (0, 0, *size))), torch.from_numpy(labels)


def model_input(image: Image.Image, size: Size) -> Tensor:
    """The image at `size` (H, W) as the model takes it, `(1, 3, H, W)` in [-1, 1]."""
    return normalise(to_tensor(resize(image, image.size[::-1], size, (0, 0, *size)))[None])


def choose_window(labels: np.ndarray, size: Size, crop: Size, rng: Generator) -> tuple[Window, np.ndarray]:
    """A window in which no class has 75 % of the labelled pixels, after 10 tries any; and its labels."""
    for _ in range(TRIES + 1):
        window = draw_window(size, crop, rng)
        cut = nearest(labels, size, window)
        count = histogram(cut)[:IGNORE]
        mixed = count.max() < LARGEST_SHARE * count.sum()
        if mixed or window == (0, 0, *size):  # the whole image is the only window
            break
    return window, cut


def draw_window(size: Size, crop: Size, rng: Generator) -> Window:
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
    return labels[rows].take(columns, axis=1)


def resize(image: Image.Image, original: Size, size: Size, window: Window) -> Image.Image:
    """The window of the image resized to `size`, bilinear and antialiased (mmcv's aliases when it shrinks).

    Only the window is computed; Pillow's filter reads beyond its box, so this is that part of the whole, to
    rounding. `original` (H, W) is the image's own size, of which `image` may be a half, a quarter or an
    eighth, rounded up.
    """
    reductions = [f for f in (1, 2, 4, 8) if image.size == (-(-original[1] // f), -(-original[0] // f))]
    assert reductions, f"the image is {image.size}, but (W, H) of its labels is {original[::-1]}"
    y, x = (whole / (shown * reductions[0]) for whole, shown in zip(original, size, strict=True))
    top, left, bottom, right = window
    box = left * x, top * y, min(right * x, image.width), min(bottom * y, image.height)
    return image.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=box)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB -> uint8 `(3, H, W)`."""
    planes = bytearray().join(image.tobytes("raw", band) for band in "RGB")
    return torch.frombuffer(planes, dtype=torch.uint8).view(3, image.height, image.width)


def photometric(image: Tensor, rng: Generator) -> Tensor:
    """uint8 `(3, H, W)` RGB -> the same, each step with probability 1/2 and cut off at 0 and 255.

    Brightness +-32, contrast 0.5-1.5, saturation 0.5-1.5, hue -36..34 degrees in steps of 2 (-18..17 in
    OpenCV's halves), and the contrast last with probability 1/2. mmsegmentation truncates after every step;
    we round once.
    """
    shift = rng.uniform(-32, 32) if coin(rng) else 0.0
    early = coin(rng)
    first = rng.uniform(0.5, 1.5) if early and coin(rng) else 1.0
    saturation = rng.uniform(0.5, 1.5) if coin(rng) else 1.0
    hue = int(rng.integers(-18, 18)) if coin(rng) else 0
    last = rng.uniform(0.5, 1.5) if not early and coin(rng) else 1.0
    result = torch.empty_like(image)
    for part, distorted in zip(image.split(STRIP, 1), result.split(STRIP, 1), strict=True):
        x = part.float().numpy()
        if shift != 0:
            np.clip(x + shift, 0, 255, out=x)
        if first != 1:
            np.clip(x * first, 0, 255, out=x)
        if saturation != 1 or hue != 0:
            recolour(x, saturation, 2 * hue)
        if last != 1:
            np.clip(x * last, 0, 255, out=x)
        distorted.numpy()[:] = np.rint(x, out=x)
    return result


def coin(rng: Generator) -> bool:
    return rng.random() < 0.5


def recolour(x: np.ndarray, saturation: float, degrees: float) -> None:
    """Scale the saturation of `(3, H, W)` float32 in 0..255 and turn the hue by 36 degrees or less, in place.

    In the HSV hexagon; the value stays. Masks are multiplied: `np.where` and `torch.where` branch at every
    pixel, which takes 20 times as long where neighbours differ (0.9 instead of 0.05 ms for 512x512).
    """
    r, g, b = x
    value = np.maximum(np.maximum(r, g), b)
    chroma = value - np.minimum(np.minimum(r, g), b)
    red = value == r
    green = (value == g) & ~red
    hue = (g - b) * red + (b - r) * green + (r - g) * ~(red | green)
    hue /= chroma.clip(1e-6, 255)
    hue += 4 - 4 * red.view(np.uint8) - 2 * green.view(np.uint8)
    hue += degrees / 60  # in sides of the hexagon, -1.6 to 5.6
    chroma = np.minimum(chroma * saturation, value)  # a saturation of at most 1
    # A channel is lowest at k = 1..3, in the middle of 0..4, and again 6 later: the ramps that k reaches.
    k = hue + 5
    np.maximum(4 - k, np.minimum(k - 6, 10 - k), out=r)
    k = hue + 3
    np.maximum(4 - k, k - 6, out=g)
    k = hue + 1
    np.maximum(np.minimum(k, 4 - k), k - 6, out=b)
    x.clip(0, 1, out=x)
    x *= chroma
    np.subtract(value, x, out=x)
