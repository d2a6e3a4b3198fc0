"""One image as predict.py reads it, from the command or from Python, and what the model predicts for it.

Top to bottom: the image, its segmentation, the model's passes over images of one size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

import inference
from errors import DataError, ModelError
from images.colours import complete_palette
from images.draw import attention_mosaic, overlay, segment_overlay
from images.read import fit, read_image, to_rgb
from loading.augment import model_input, resize
from loading.tags import tag_key
from mask2former import PredictedSegment
from model import Size, Tada


class Photo(NamedTuple):
    """An image as it was read."""

    image: Image.Image  # upright
    small: Image.Image  # at the size that the model reads
    words: list[str] | None  # that are given; None: those of the tagger, or the class names
    line: dict  # of predictions.jsonl, as far as it is known

    @classmethod
    def of(cls, image: Image.Image, box: Size | None, words: list[str] | None, line: dict) -> "Photo":
        size = image.size[::-1]
        small = fit(size, *box) if box else size
        return cls(image, resize(image, size, small, (0, 0, *small)), words, line)


def open_image(image: str | Path | Image.Image | np.ndarray) -> Image.Image:
    """An upright RGB image, never the caller's own. Raises DataError."""
    if isinstance(image, (str, Path)):
        return read_image(image)[0]
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or not image.size or image.shape[2:] not in ((), (3,)) or image.ndim < 2:
            form = "give uint8 in 0..255 of shape (H, W, 3), RGB, or (H, W)"
            raise DataError(f"an image of {image.dtype} and shape {image.shape} cannot be read: {form}")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise DataError(f"an image of type {type(image).__name__}: give a path, a PIL image or a numpy array")
    try:
        image = image.copy()
        image.getexif()  # kept by the image
        image.info = {}  # as `read_image`
        ImageOps.exif_transpose(image, in_place=True)
        if min(image.size) < 1:
            raise ValueError(f"its size is {image.width}x{image.height}")
        return to_rgb(image, "the image")
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - a file that Pillow opened is decoded only here
        raise DataError(f"the image cannot be read ({error}): give another") from None


def sizes(photo: Photo) -> tuple[Size, Size]:
    """(H, W) that the model reads, and of the result."""
    return photo.small.size[::-1], photo.image.size[::-1]


@dataclass
class Segmentation:
    """What the model predicts for an image of (H, W)."""

    tada: Tada
    photo: Photo
    labels: np.ndarray  # (H, W) uint8: indices into tada.config.classes
    tags: list[str] | None  # the words that it was given; None without words per image
    ids: np.ndarray | None = None  # (H, W), of mask2former: the id of each pixel's segment, 0 = none
    segments: Sequence[PredictedSegment] = ()  # of mask2former

    @property
    def input(self) -> Tensor:
        """The image as the model reads it, `(1, 3, h, w)` in [-1, 1], on the model's device."""
        small = self.photo.small
        return model_input(small, small.size[::-1]).to(self.tada.unet.conv_in.weight.device)

    @property
    def shares(self) -> dict[str, float]:
        """The share of the pixels of each class that occurs, the largest first."""
        counts, classes = Image.fromarray(self.labels).histogram(), self.tada.config.classes
        order = sorted((k for k in range(len(classes)) if counts[k]), key=lambda k: -counts[k])
        return {classes[k]: counts[k] / self.labels.size for k in order}

    @property
    def palette(self) -> np.ndarray:
        """The colour of each class, `(K, 3)` uint8."""
        config = self.tada.config
        return complete_palette(config.palette or [None] * len(config.classes))

    def label_map(self) -> Image.Image:
        """The labels as an image of mode P: indices, shown in their classes' colours."""
        image = Image.fromarray(self.labels)
        image.putpalette(self.palette.tobytes())
        return image

    def overlay(self) -> Image.Image:
        """The image under the colours of its classes, over a legend."""
        names = {"palette": self.palette, "classes": self.tada.config.classes, "words": self.tags}
        if self.ids is None:
            return overlay(self.photo.image, self.labels, **names)
        return segment_overlay(self.photo.image, self.ids, self.segments, **names)

    def attention(self, word: str) -> np.ndarray:
        """Each pixel's attention to a word, or a class without words: `(h, w)` float32 in 0..1, at the size
        that the model reads. Raises ModelError.
        """
        words = [*map(tag_key, self.tada.config.classes if self.tags is None else self.tags)]
        if tag_key(word) not in words:
            words = ", ".join(words)[:200] or "none"
            raise ModelError(f"{word!r} is not among the words ({words}): predict the image with it")
        return self.maps[words.index(tag_key(word))]

    def attention_overlay(self) -> Image.Image:
        """The attention to each word as a glow over the image. Raises ModelError."""
        return attention_mosaic(self.photo.image, self.maps, self.tada.config.classes, words=self.tags)

    @cached_property
    def maps(self) -> np.ndarray:
        """The attention to all words, `(T, h, w)`, which sums to 1 over T; a second pass, when first used."""
        return attend([self])[0]


@torch.no_grad()
def predict_photos(
    tada: Tada, photos: Sequence[Photo], *, scales: Sequence[float], flip: bool, reading: dict[str, float]
) -> list[Segmentation]:
    """Predict images of one size together; `reading` is of mask2former."""
    config, device, (small, size) = tada.config, tada.unet.conv_in.weight.device, sizes(photos[0])
    x = torch.cat([model_input(photo.small, small) for photo in photos]).to(device)  # (B, 3, h, w)
    original = x  # as in eval.py
    if tuple(scales) != (1.0,):
        original = torch.cat([model_input(photo.image, size) for photo in photos]).to(device)
    how = {"window": config.crop, "stride": config.stride, "scales": scales, "flip": flip}
    given = None if photos[0].words is None else [photo.words for photo in photos]
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        tags, seen = tada.resolve_tags(x, given)
        if config.decoder == "mask2former":
            prediction = inference.segment(tada, x, tags, seen=seen, size=size, **reading)
        else:
            seen = seen if original is x else None
            prediction = inference.predict(tada, original, tags, seen=seen, size=size, base=small, **how)
    labels, panoptic = prediction.labels.byte().cpu().numpy(), prediction.panoptic
    segmentations = []
    for i, photo in enumerate(photos):
        ids, segments = panoptic[i] if panoptic else (None, ())
        ids = None if ids is None else ids.cpu().numpy()
        segmentations.append(Segmentation(tada, photo, labels[i], tags and tags[i], ids, segments))
    return segmentations


@torch.no_grad()
def attend(segmentations: Sequence[Segmentation]) -> list[np.ndarray]:
    """The attention of images of one size to their words, `(T, h, w)` each."""
    x = torch.cat([one.input for one in segmentations])
    tags = None if segmentations[0].tags is None else [one.tags for one in segmentations]
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
        maps = inference.attention_in_windows(segmentations[0].tada, x, tags).cpu().numpy()  # (B, T, h, w)
    if tags is None:
        return [*maps]
    return [rows[: max(len(words), 1)] for rows, words in zip(maps, tags, strict=True)]  # no padding
