"""Predict images of any size: resizing, sliding windows, scales and flips; segments; attention maps.

    prediction = predict(tada.eval(), image, [["sea", "boat"]], size=(H, W))  # labels (B, H, W)

Top to bottom: semantic prediction, panoptic prediction, attention, and their parts: the sliding window, the
grid of windows, the class of each pixel.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adapter import Tagging
from decoders import resize
from errors import ModelError
from mask2former import OVERLAP, SCORE, Instances, Panoptic
from model import Features, Size, Tada, Tags

STRIP = 2**24  # softmax values in memory at once: 64 MiB
# Pixels that the model reads at once. CPU: of tiny at 128x128, 4 to 24 images take the same time an image on
# one thread, half of that one by one; 16 are fastest on two. GPU: as many as 8 windows of 512, not measured.
BATCH = {"cpu": 2**18, "gpu": 2**21}


class Prediction(NamedTuple):
    """labels `(B, H, W)` int64 in 0..K-1; tag_logits `(B, K)` of Eq. 7, None without tagging."""

    labels: Tensor
    tag_logits: Tensor | None
    panoptic: list[Panoptic] | None = None  # the segments of each image, of mask2former
    instances: list[Instances] | None = None  # None unless requested


@torch.no_grad()
def predict(
    tada: Tada,
    image: Tensor,
    tags: Tags | None = None,
    *,
    seen: Features | None = None,
    size: Size | None = None,
    base: Size | None = None,
    window: Size | None = None,
    stride: Size | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Prediction:
    """Predict the labels of images `(B, 3, H, W)` in [-1, 1] at `size` (H, W), by default their own size.

    Each scale resizes the image to scale times `base` (H, W), by default its own size, and runs the model on
    the whole image or on windows whose logits are averaged where they overlap; `flip` adds the mirrored
    image. The softmax of all passes is averaged at `size` (the protocol of VPD and mmsegmentation). If the
    model uses CLIP's tags and none are given, every pass gets the tags of the whole image. `tags` and `seen`
    are those of `resolve_tags`. The image is taken as it is: predict.py's `predict_image` resizes it into the
    model's box and reads it in the model's windows first, as the commands do.
    """
    if tags is None:
        tags, seen = tada.resolve_tags(image, None)
    own = tuple(image.shape[-2:])
    maps, tag_logits = [], []
    for scale in scales:
        target = tuple(max(int(scale * side + 0.5), 1) for side in base or own)
        scaled = image if target == own else F.interpolate(image, target, mode="bilinear", antialias=True)
        for mirrored in (False, True)[: 1 + flip]:
            view = scaled.flip(3) if mirrored else scaled
            known = seen if view is image else None
            logits, highest = slide(tada, view, tags, window or target, stride or window or target, known)
            maps.append(logits.flip(3) if mirrored else logits)
            tag_logits.append(highest)
    mean = None if tag_logits[0] is None else torch.stack(tag_logits).mean(0)
    return Prediction(vote(maps, size or own), mean)


@torch.no_grad()
def segment(
    tada: Tada,
    image: Tensor,
    tags: Tags | None = None,
    *,
    seen: Features | None = None,
    size: Size | None = None,
    score: float = SCORE,
    overlap: float = OVERLAP,
    instances: bool = False,
) -> Prediction:
    """Segment images `(B, 3, H, W)` in [-1, 1] with Mask2Former at `size` (H, W), by default their own size.

    One pass over the whole image: windows would cut objects. The labels equal those of `predict`, whose
    arguments these are. `score` and `overlap` are thresholds, see `Mask2Former.panoptic`.
    """
    if tags is None:
        tags, seen = tada.resolve_tags(image, None)
    output = tada(image, tags, seen)
    sizes = tuple(tada.padded(image).shape[-2:]), tuple(image.shape[-2:]), size
    H, W = image.shape[-2:]
    logits = tada.decoder.logits(output.prediction, sizes[0])[..., :H, :W]
    labels = vote([logits], size or (H, W))
    panoptic = tada.decoder.panoptic(output.prediction, *sizes, score, overlap)
    things = tada.decoder.instances(output.prediction, *sizes) if instances else None
    return Prediction(labels, output.condition.logits, panoptic, things)


@torch.no_grad()
def attention(tada: Tada, image: Tensor, tags: Tags | None = None) -> Tensor:
    """The attention of each pixel of `(B, 3, H, W)` to each word: `(B, T, H, W)` float32, sum 1 over T.

    The words are each image's `tags` (shorter lists are padded with 0) or the class names. Averages the
    UNet's attention maps at strides 16 and 32, as VPD, resized to the image. With tagging the UNet attends to
    the adapter's queries: then the attention to a word is the sum over queries q of A_unet[q, pixel]
    A_text[q, word], with A_text from the adapter's last block. Raises ModelError for a condition without
    words.
    """
    config = tada.config
    if config.condition not in ("classes", "tagging", "tags", "oracle"):
        cure = "use classes, tagging, tags or oracle"
        raise ModelError(f"condition {config.condition} has no words to attend to: {cure}")
    if tags is not None and config.tag_tokens == "prompt":
        raise ModelError("tag_tokens 'prompt' joins the tags into one text: use a model with 'pooled'")
    (H, W), text = image.shape[2:], tada.text(tags)
    latent = tada.noised(tada.vae.encode(tada.padded(image)))
    tokens, embedding = tada.image_features(image)
    condition = tada.adapter(tokens, embedding, text)
    _, (_, *maps) = tada.unet.features_and_attention(*tada.unet_input(latent, condition))
    if isinstance(tada.adapter, Tagging):
        words = tada.adapter.attention(tokens, text)  # (B, Q, T)
        maps = [torch.einsum("BQhw,BQT->BThw", x, words).float() for x in maps]
    padded = tada.padded(image).shape[-2:]
    return sum(resize(x, padded) for x in maps)[..., :H, :W] / len(maps)


def attention_in_windows(tada: Tada, image: Tensor, tags: Tags | None = None) -> Tensor:
    """`attention` in the windows of training's crop, blended where they overlap: `(B, T, H, W)`.

    A window's weight falls from its middle to its border, so that no border shows as a seam.
    """
    size, parts = tuple(image.shape[2:]), []
    for top, left, bottom, right in windows(size, tada.config.crop, tada.config.stride):
        part = attention(tada, image[..., top:bottom, left:right], tags)
        parts.append((part, (top, left, bottom, right)))
    total, weights = part.new_zeros(*part.shape[:2], *size), part.new_zeros(size)
    rows, columns = (torch.arange(1, side + 1).to(part) for side in part.shape[2:])
    weight = torch.minimum(rows, rows.flip(0))[:, None] * torch.minimum(columns, columns.flip(0))
    for part, (top, left, bottom, right) in parts:
        total[..., top:bottom, left:right] += weight * part
        weights[top:bottom, left:right] += weight
    return total.div_(weights)


# ---- parts


def slide(
    tada: Tada, image: Tensor, tags: Tags | None, window: Size, stride: Size, seen: Features | None = None
) -> tuple[Tensor, Tensor | None]:
    """Run the model on sliding windows: logits `(B, K, H, W)`, averaged where windows overlap, and tag logits
    `(B, K)`, the maximum over the windows.

    The padding of a window is cropped before its logits are added.
    """
    B, _, H, W = image.shape
    places = windows((H, W), window, stride)
    h, w = (min(pair) for pair in zip(window, (H, W), strict=True))

    def read(parts: Tensor, tags: Tags | None, seen: Features | None = None) -> tuple[Tensor, Tensor | None]:
        output, padded = tada(parts, tags, seen), tuple(tada.padded(parts).shape[-2:])
        return tada.decoder.logits(output.prediction, padded)[..., :h, :w].float(), output.condition.logits

    if len(places) == 1:
        return read(image, tags, seen)
    total = image.new_zeros(B, len(tada.config.classes), H, W, dtype=torch.float32)
    count = image.new_zeros(1, 1, H, W)
    tag_logits, n = [], at_once((B * h, w), image.device)
    for group in (places[i : i + n] for i in range(0, len(places), n)):
        parts = torch.cat([image[..., top:bottom, left:right] for top, left, bottom, right in group])
        logits, highest = read(parts, tags and [*tags] * len(group))
        for (top, left, bottom, right), part in zip(group, logits.split(B), strict=True):
            total[..., top:bottom, left:right] += part
            count[..., top:bottom, left:right] += 1
        tag_logits += [] if highest is None else highest.split(B)
    return total.div_(count), torch.stack(tag_logits).amax(dim=0) if tag_logits else None


def at_once(size: tuple[float, float], device: torch.device) -> int:
    """How many images or windows of `size` the model reads at once, at least 1."""
    return max(int(BATCH["cpu" if device.type == "cpu" else "gpu"] / (size[0] * size[1])), 1)


def windows(size: Size, window: Size, stride: Size) -> list[tuple[int, int, int, int]]:
    """Top, left, bottom and right of each window in an image of `size` (H, W).

    The grid of mmsegmentation (segmentors/encoder_decoder.py, `slide_inference`): the last row and column of
    windows are shifted to end at the image's border. A window larger than the image shrinks to the image.
    """
    starts = []
    for whole, part, step in zip(size, window, stride, strict=True):
        assert 1 <= step <= part, f"a stride of {step} leaves gaps between windows of {part}: give 1..{part}"
        part = min(part, whole)
        starts.append([min(i * step, whole - part) for i in range(math.ceil((whole - part) / step) + 1)])
    h, w = (min(part, whole) for part, whole in zip(window, size, strict=True))
    return [(top, left, top + h, left + w) for top in starts[0] for left in starts[1]]


def vote(maps: Sequence[Tensor], size: Size) -> Tensor:
    """The class `(B, H, W)` of the highest mean softmax of the logits `(B, K, h_i, w_i)` resized to `size`.

    In strips of rows: an image of 14 megapixels and 150 classes would need 8 GB at once.
    """
    if len(maps) == 1:  # its highest logit has the highest probability
        return resized_argmax(maps[0], size)
    labels = torch.empty(len(maps[0]), *size, dtype=torch.int64, device=maps[0].device)
    for top, bottom in strips(maps[0], size):
        total = sum(resize_rows(x, size, top, bottom).softmax(dim=1) for x in maps)
        labels[:, top:bottom] = total.max(dim=1).indices
    return labels


def resized_argmax(x: Tensor, size: Size) -> Tensor:
    """The argmax over K of `resize(x, size)`: `(B, K, h, w)` -> `(B, H, W)`.

    A pixel is an average of four logits; where those have one argmax, so has the pixel. Only the others,
    along borders, are interpolated: at 12 megapixels of 24 classes in a tenth of the time.
    """
    coarse = x.max(dim=1).indices
    if coarse.shape[1:] == size:
        return coarse
    mixed = coarse != coarse.roll(-1, 1)  # the last row's next one has no weight
    mixed |= (coarse != coarse.roll(-1, 2)) | (coarse != coarse.roll((-1, -1), (1, 2)))
    above, below, down = taps(x.shape[2], size[0], x.device)
    left, right, along = taps(x.shape[3], size[1], x.device)
    labels = coarse[:, :, left][:, above]
    for top, bottom in strips(x, size):
        b, i, j = mixed[:, above[top:bottom]][:, :, left].nonzero().unbind(dim=1)
        if len(b) > labels[:, top:bottom].numel() / 8:  # then picking them costs more than it saves
            labels[:, top:bottom] = resize_rows(x, size, top, bottom).max(dim=1).indices
            continue
        first, last, i = int(above[top]), int(below[bottom - 1]), i + top
        near = x[:, :, first : last + 1].permute(0, 2, 3, 1).contiguous()  # (B, rows, w, K)
        ends = [(near[b, above[i] - first, x], near[b, below[i] - first, x]) for x in (left[j], right[j])]
        start, end = (torch.lerp(*pair, down[i, None]) for pair in ends)  # (N, K)
        labels[b, i, j] = torch.lerp(start, end, along[j, None]).max(dim=1).indices
    return labels


def strips(x: Tensor, size: Size) -> list[tuple[int, int]]:
    """First and last row + 1 of strips in which a resized `x (B, K, h, w)` has at most `STRIP` values."""
    rows = max(STRIP // (x.shape[0] * x.shape[1] * size[1]), 1)
    return [(top, min(top + rows, size[0])) for top in range(0, size[0], rows)]


def resize_rows(x: Tensor, size: Size, top: int, bottom: int) -> Tensor:
    """Rows top..bottom-1 of `resize(x, size)`: `(B, K, h, w)` -> `(B, K, bottom - top, W)`."""
    if (top, bottom) == (0, size[0]):
        return resize(x, size)
    above, below, share = (y[top:bottom] for y in taps(x.shape[2], size[0], x.device))
    rows = x[:, :, above] * (1 - share)[:, None] + x[:, :, below] * share[:, None]
    return resize(rows, (bottom - top, size[1]))


def taps(side: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The two of `side` values that `resize` averages for each of `size`, and the share of the second."""
    place = ((torch.arange(size, device=device) + 0.5) * (side / size) - 0.5).clamp(0, side - 1)
    first = place.floor().long()
    return first, (first + 1).clamp(max=side - 1), place - first


def stride_of(side: int) -> int:
    """Two thirds of a window's side, as mmsegmentation: 341 of 512, 683 of 1024, but 426 of 640."""
    return 426 if side == 640 else max(round(side * 2 / 3), 1)
