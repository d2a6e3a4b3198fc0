"""Pictures with dense labels: official layouts as they are, checks, joint transforms, resumable order, tags.

    dataset = open_dataset("ade20k", "data/ADEChallengeData2016", "train")
    print(check(dataset))
    stream = TrainStream(dataset, crop=(512, 512), short=512, long=2048, batch=16, seed=0, rank=0, world=1)
    for batch in stream.batches(position): ...  # `position`: global samples done, for resuming

Pictures leave this file as uint8 `(3, H, W)`, RGB; `normalise` makes them the model's floats in [-1, 1].
Labels are uint8 `(H, W)` with classes 0..K-1 and 255 = ignore. Nothing here reads or moves a global random
state: a sample is a function of (seed, epoch, index), the order one of (seed, position). The recipe is
mmsegmentation's, as in VPD (mmseg/datasets/pipelines/transforms.py of its 0.x); where we differ on purpose,
the function says so.
"""

import atexit
import codecs
import json
import os
import re
import signal
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader

IGNORE = 255  # the label of pixels that belong to no class
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
LOSSLESS = (".png", ".bmp", ".tif", ".tiff")  # JPEG would mix the classes along every border
TRAIN_IDS = "_labelTrainIds"  # label files with this ending already hold 0..K-1
MAX_PIXELS = 64_000_000  # 192 MB decoded
SHOWN = 10  # paths in a message

Size = tuple[int, int]  # height, width
Sample = tuple[Image.Image, np.ndarray]  # an RGB picture and its labels (H, W) uint8


class DataError(ValueError):
    """What is wrong with the data, where, and what helps, for the user."""


class Unreadable(DataError):
    """One file that cannot be decoded; training goes on without it."""


class CheckError(DataError):
    """What `check` found; `report` holds the table and every fault."""

    def __init__(self, message: str, report: "Report"):
        super().__init__(message)
        self.report = report


class DataWarning(UserWarning):
    """Something was left out and the run goes on."""


# ---- the data sets ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a data set lies on disk, as published (mmsegmentation's docs/en/dataset_prepare.md)."""

    root: str  # its official name
    pictures: str  # folders below the root, with {} for the split
    labels: str
    splits: dict[str, str]  # our name of a split -> theirs
    picture: str = ""  # how a picture's name ends before its extension
    label: tuple[str, ...] = ("",)  # how a label's name ends, the preferred one first
    ignored: range = range(0)  # raw values that are legal although no class has them
    hint: str = ""  # what a label file that does not fit usually is


LAYOUTS = {
    "ade20k": Layout(
        root="ADEChallengeData2016",
        pictures="images/{}",
        labels="annotations/{}",
        splits={"train": "training", "val": "validation"},
        ignored=range(1),  # 0: other objects
        hint="; the RGB *_seg.png of the full ADE20K are another format, use ADEChallengeData2016",
    ),
    "cocostuff": Layout(
        root="coco_stuff164k",
        pictures="images/{}",
        labels="annotations/{}",
        splits={"train": "train2017", "val": "val2017"},
        label=("", TRAIN_IDS),
        hint="; the 10k version and the API's examples number otherwise, use stuffthingmaps_trainval2017.zip",
    ),
    "cityscapes": Layout(
        root="cityscapes",
        pictures="leftImg8bit/{}",
        labels="gtFine/{}",
        splits={"train": "train", "val": "val"},
        picture="_leftImg8bit",
        label=(f"_gtFine{TRAIN_IDS}", "_gtFine_labelIds"),
        ignored=range(34),  # the labelIds; labels/cityscapes.txt lists the 19 that are evaluated
    ),
    "folder": Layout(
        root="the folder that holds images, labels and classes.txt",
        pictures="images/{}",
        labels="labels/{}",
        splits={"train": "train", "val": "val"},
    ),
}

# COCO-Stuff's compounds are "thing-kind", and these are not or would read badly.
IRREGULAR = {
    "window-blind": "window blind",
    "structural-other": "structure",
    "playingfield": "playing field",
    "waterdrops": "water drops",
}


class Dataset:
    """One split: `classes` as shown, `prompts` as a text tower reads them, `palette (K, 3)`, pictures."""

    def __init__(self, name: str, split: str, classes: list[str], palette: np.ndarray):
        self.name, self.split, self.classes, self.palette = name, split, classes, palette
        self.prompts = [prompt(c, name) for c in classes]
        self.missing: list[
            str
        ] = []  # a sentence for each picture without labels, and for labels without a picture

    def __len__(self) -> int:
        raise NotImplementedError

    def path(self, i: int) -> str:
        """Where picture `i` is, relative to the root, with "/": the key of tag files."""
        raise NotImplementedError

    def files(self, i: int) -> list[Path]:
        """The files of sample `i`."""
        raise NotImplementedError

    def load(self, i: int, short: int | None = None, long: int | None = None) -> Sample:
        """Picture `i`, RGB, and its labels `(H, W)` uint8, 255 = ignore. Raises DataError with the path.

        With the box (short, long) that it will be resized into, a large JPEG comes reduced (see
        `read_picture`). The labels never do: their shape is the picture's own.
        """
        raise NotImplementedError


class Files(Dataset):
    """A data set that lies on disk."""

    def __init__(self, name: str, root: Path, split: str):
        layout = LAYOUTS[name]
        table = root / "classes.txt" if name == "folder" else Path(__file__).parent / "labels" / f"{name}.txt"
        classes, palette, raw = read_classes(table)
        super().__init__(name, split, classes, palette)
        self.root, self.hint = root, layout.hint
        self.raw_ids, self.train_ids = values(raw, layout.ignored), values(range(len(classes)), ())
        folder = layout.pictures.format(layout.splits[split])
        pictures = scan(root, folder, PICTURES, (layout.picture,))
        labels = scan(root, layout.labels.format(layout.splits[split]), LOSSLESS, layout.label)
        if not pictures:
            raise DataError(
                f"{root / folder} holds no picture *{layout.picture}.jpg, .png, ...: check --data"
            )
        self.pairs = [(pictures[key], labels.get(key)) for key in sorted(pictures)]
        self.missing = [self.unlabelled(i) for i, (_, label) in enumerate(self.pairs) if label is None]
        self.missing += [
            f"{root / labels[key]} has no picture" for key in sorted(labels) if key not in pictures
        ]

    def __len__(self) -> int:
        return len(self.pairs)

    def path(self, i: int) -> str:
        return self.pairs[i][0]

    def unlabelled(self, i: int) -> str:
        return f"{self.root / self.path(i)} has no label file"

    def files(self, i: int) -> list[Path]:
        return [self.root / file for file in self.pairs[i] if file]

    def load(self, i: int, short: int | None = None, long: int | None = None) -> Sample:
        picture, label = self.pairs[i]
        if label is None:
            raise DataError(self.unlabelled(i))
        image, size = read_picture(self.root / picture, short, long)
        table = self.train_ids if Path(label).stem.endswith(TRAIN_IDS) else self.raw_ids
        labels = read_labels(self.root / label, table, self.hint)
        if labels.shape != size:
            (H, W), (h, w) = size, labels.shape
            raise DataError(
                f"{self.root / label} is {w}x{h} and its picture, turned as its EXIF tag says, {W}x{H}: "
                "both need the same size"
            )
        return image, labels


class Scenes(Dataset):
    """The drawn data set: no files; `path` is "scenes/" and the index that `scenes.draw` takes."""

    def __init__(self, split: str):
        import scenes

        if split not in scenes.SPLITS:
            raise DataError(f"scenes has no split {split!r}: choose {', '.join(scenes.SPLITS)}")
        self.indices = scenes.SPLITS[split]
        super().__init__("scenes", split, list(scenes.CLASSES), np.array(scenes.PALETTE, np.uint8))

    def __len__(self) -> int:
        return len(self.indices)

    def path(self, i: int) -> str:
        return f"scenes/{self.indices[i]:06d}"

    def files(self, i: int) -> list[Path]:
        return []

    def load(self, i: int, short: int | None = None, long: int | None = None) -> Sample:
        import scenes

        scene = scenes.draw(self.indices[i])
        return Image.fromarray(scene.image), np.array(scene.labels)


def open_dataset(name: str, root: str | Path, split: str) -> Dataset:
    """The split "train" or "val" of "ade20k", "cocostuff", "cityscapes", "folder"; of "scenes" also "test".

    `root` is the folder that the data set's authors name (scenes need none). Files are listed, not opened;
    `check` opens some. Raises DataError if this is not the data set, or the list of classes cannot be read.
    """
    if name == "scenes":
        return Scenes(split)
    if name not in LAYOUTS:
        raise DataError(f"there is no data set {name!r}: choose {', '.join(LAYOUTS)} or scenes")
    layout, root = LAYOUTS[name], Path(root)
    if split not in layout.splits:
        raise DataError(f"{name} has no labelled split {split!r}: choose {' or '.join(layout.splits)}")
    needed = [part.format(layout.splits[split]) for part in (layout.pictures, layout.labels)]
    needed += ["classes.txt"] if name == "folder" else []
    absent = [part for part in needed if not (root / part).exists()]
    if absent:
        inside = root / layout.root
        cure = f"give --data {inside}" if inside.is_dir() else f"--data must be {layout.root}"
        raise DataError(f"{root} is not {name}: {' and '.join(absent)} not found there; {cure}")
    return Files(name, root, split)


def prompt(name: str, dataset: str) -> str:
    """A class name as a text tower should read it: "floor-wood" -> "wood floor", "sky-other" -> "sky"."""
    if dataset == "cocostuff" and name in IRREGULAR:
        return IRREGULAR[name]
    if dataset == "cocostuff" and "-" in name:
        thing, kind = name.split("-")
        return thing if kind in ("other", "stuff") else f"{kind} {thing}"
    return name.replace("_", " ")


def read_classes(file: Path) -> tuple[list[str], np.ndarray, list[int]]:
    """Names, palette `(K, 3)` uint8 and raw label values of a table: one class a line, in train-id order.

    A line is "name", "name, r g b" or "name, r g b, raw value"; without a colour the class gets one of its
    own.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file} cannot be read as UTF-8 text ({error}): give it one class name a line"
        ) from None
    names, palette, raw = [], [], []
    for i, line in enumerate(lines):
        match = re.fullmatch(r"\s*([^,]*[^,\s])\s*(?:,\s*(\d+) (\d+) (\d+)\s*)?(?:,\s*(\d+)\s*)?", line)
        colour = [int(x) for x in match.group(2, 3, 4)] if match and match[2] else distinct_colour(i + 1)
        value = int(match[5]) if match and match[5] else i
        if not match or max(colour) > 255 or value >= IGNORE:
            raise DataError(
                f"{file}, line {i + 1}: expected a class as 'name' or 'name, r g b', not {line[:60]!r}"
            )
        if match[1] in names or value in raw:
            raise DataError(f"{file}, line {i + 1}: {line!r} repeats a name or a value")
        names.append(match[1])
        palette.append(colour)
        raw.append(value)
    if not names:
        raise DataError(f"{file} lists no class: give it one class name a line")
    return names, np.array(palette, np.uint8), raw


def distinct_colour(n: int) -> list[int]:
    """Colour n of PASCAL VOC's map, 1..255: the bits of n are dealt to R, G, B in turn, high bits first."""
    return [sum((n >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)]


def values(raw: Iterable[int], ignored: Iterable[int]) -> np.ndarray:
    """A table raw value 0..255 -> train id, 255 = ignore, -1 = illegal. Raw 255 always means ignore."""
    table = np.full(256, -1, np.int16)
    table[[*ignored, IGNORE]] = IGNORE
    for train_id, value in enumerate(raw):
        table[value] = train_id
    return table


def scan(root: Path, folder: str, suffixes: tuple[str, ...], endings: tuple[str, ...]) -> dict[str, str]:
    """Files below root/folder: relative path without ending and suffix -> path relative to `root`, with "/".

    Of several files with one key the one whose ending is listed first is taken; two with the same ending are
    refused.
    """
    found: dict[str, tuple[int, str]] = {}
    for where, _, names in os.walk(root / folder, followlinks=True):
        below = Path(where).relative_to(root).as_posix()
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            fits = [ending for ending in endings if stem.endswith(ending)]
            if suffix.lower() not in suffixes or name.startswith(".") or not fits:
                continue
            ending = max(fits, key=len)
            key = f"{below}/{stem.removesuffix(ending)}".removeprefix(folder)
            new = (endings.index(ending), f"{below}/{name}")
            old = found.setdefault(key, new)
            if old[0] == new[0] and old != new:
                raise DataError(
                    f"{root / old[1]} and {root / new[1]} differ only in their extension: rename one"
                )
            found[key] = min(old, new)
    return {key: path for key, (_, path) in found.items()}


# ---- files -----------------------------------------------------------------------------------------------


@contextmanager
def opened(path: Path, limit: int) -> Iterator[Image.Image]:
    """The file, open and not yet decoded; whatever goes wrong with it becomes an Unreadable that names it."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > limit:
                raise Image.DecompressionBombError(f"{image.width}x{image.height}")
            yield image
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise Unreadable(f"{path} is too large ({error}): at most {limit:,} pixels are read") from None
    except UnidentifiedImageError:
        raise Unreadable(
            f"{path} is not a picture, or its first bytes are damaged: replace or remove it"
        ) from None
    except (OSError, SyntaxError, ValueError) as error:  # SyntaxError: a broken PNG
        reason = getattr(error, "strerror", None) or error
        raise Unreadable(f"{path} cannot be read ({reason}): replace or remove it") from None


GAP = 3  # a reduced JPEG keeps at least this many times the pixels, per side, that the picture is resized to


def read_picture(
    path: str | Path, short: int | None = None, long: int | None = None, limit: int = MAX_PIXELS
) -> tuple[Image.Image, Size]:
    """The first frame as 8-bit RGB, turned upright by its EXIF tag, and its full (H, W). Raises Unreadable.

    Grey, palette, CMYK and 16-bit pictures are converted; transparency is dropped, as OpenCV drops it. With
    the box (short, long) that it will be resized into, a JPEG 2 GAP times larger or more is decoded at 1/2,
    1/4 or 1/8. On photographs the resized picture then differs by at most 0.8 of 255 levels on average, 3 in
    99 of 100 pixels.
    """
    with opened(Path(path), limit) as image:
        W, H = image.size
        if short:
            h, w = fit((H, W), short, long)
            image.draft(None, (GAP * w, GAP * h))
        image.load()
        if image.getexif().get(0x0112) in (5, 6, 7, 8):  # Orientation: the four that lie on their side
            W, H = H, W
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "F":
            raise Unreadable(f"{path} holds floating-point numbers (mode F): save it with 8 bits a channel")
        if image.mode.startswith("I"):  # 16 bits, which convert() would clip at 255
            image = Image.fromarray((np.asarray(image).astype(np.int32) >> 8).clip(0, 255).astype(np.uint8))
        image.info.pop("transparency", None)  # convert() warns about a palette's
        return image if image.mode == "RGB" else image.convert("RGB"), (H, W)


def read_labels(path: str | Path, table: np.ndarray, hint: str = "", limit: int = MAX_PIXELS) -> np.ndarray:
    """A label file as train ids `(H, W)` uint8, by `table` (see `values`). Raises DataError."""
    with opened(Path(path), limit) as image:
        if image.mode not in ("L", "P", "I") and not image.mode.startswith("I;16"):
            raise DataError(
                f"{path} has mode {image.mode}: labels are class numbers in a grey or palette PNG "
                f"(mode L, P or I;16){hint}"
            )
        raw = np.asarray(image)
    found = np.flatnonzero(np.bincount(raw.ravel())) if raw.dtype == np.uint8 else np.unique(raw)
    wrong = [int(x) for x in found if not 0 <= x <= 255 or table[x] < 0]
    if wrong:
        raise DataError(
            f"{path} holds the value {', '.join(map(str, wrong[:SHOWN]))}: "
            f"labels here are {spans(table)}{hint}"
        )
    return np.take(table.astype(np.uint8), raw)


def spans(table: np.ndarray) -> str:
    """The legal raw values of a table: "0..18, 255"."""
    legal = np.flatnonzero(table >= 0)
    runs = np.split(legal, np.flatnonzero(np.diff(legal) > 1) + 1)
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


# ---- checked before training -----------------------------------------------------------------------------


@dataclass
class Report:
    """What `check` saw; `str` makes it a table."""

    title: str
    classes: list[str]
    sizes: list[Size]  # of the pictures that were read
    pixels: np.ndarray  # (256,) of each train id in them
    faults: list[str]  # one sentence for each, with its path

    def __str__(self) -> str:
        if not self.sizes:
            return self.title
        low, middle, high = (np.quantile(self.sizes, q, axis=0, method="nearest") for q in (0, 0.5, 1))
        lines = [
            self.title,
            f"  height {low[0]} to {high[0]}, median {middle[0]}",
            f"  width  {low[1]} to {high[1]}, median {middle[1]}",
            f"  {self.pixels[IGNORE] / self.pixels.sum():.2%} of the pixels are ignored; of the others:",
        ]
        counts = self.pixels[: len(self.classes)]
        order = [k for k in np.argsort(-counts, kind="stable") if counts[k]]
        cells = [f"{counts[k] / counts.sum():7.2%} {self.classes[k]}" for k in order]
        width = max(map(len, cells), default=0) + 2
        for i in range(0, len(cells), 3):
            lines.append("".join(cell.ljust(width) for cell in cells[i : i + 3]).rstrip())
        absent = [name for name, count in zip(self.classes, counts, strict=True) if not count]
        if absent:
            lines.append(f"  not seen ({len(absent)}): {', '.join(absent)}")
        return "\n".join(lines)


def check(dataset: Dataset, samples: int = 200) -> Report:
    """Look at the size of every file, and decode `samples` evenly spaced pictures with their labels.

    Raises CheckError, with at most ten of the faults: missing counterparts, files that are empty or cannot be
    decoded, labels of a wrong mode, value or size, nothing labelled at all.
    """
    faults, sizes, pixels, spoilt = list(dataset.missing), [], np.zeros(256, np.int64), set()
    for i in range(len(dataset)):
        for file in dataset.files(i):
            if not has_content(file):
                faults.append(f"{file} is empty or gone")
                spoilt.add(i)
    chosen = np.linspace(0, len(dataset) - 1, min(samples, len(dataset))).astype(int).tolist()
    for i in chosen:
        if i in spoilt:
            continue
        try:
            _, labels = dataset.load(i)
        except DataError as error:
            if str(error) not in dataset.missing:
                faults.append(str(error))
            continue
        sizes.append(labels.shape)
        pixels += np.bincount(labels.ravel(), minlength=256)
    if sizes and not pixels[:IGNORE].any():
        faults.append(f"all {len(sizes)} label files that were read hold nothing but ignored pixels")
    title = f"{dataset.name} {dataset.split}: {len(dataset):,} pictures, {len(sizes):,} of them read"
    report = Report(title, dataset.classes, sizes, pixels, faults)
    if faults:
        raise CheckError(
            f"{dataset.name} {dataset.split} has {len(faults)} faults, mend or remove these files:"
            + "".join(f"\n  {fault}" for fault in faults[:SHOWN])
            + (f"\n  and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""),
            report,
        )
    return report


def has_content(file: Path) -> bool:
    try:
        return file.stat().st_size > 0
    except OSError:
        return False


# ---- transforms, of picture and labels together ----------------------------------------------------------

RATIOS = (0.5, 2.0)  # of the base box; mmsegmentation's `ratio_range`
LARGEST_SHARE = 0.75  # of one class in a crop; mmsegmentation's `cat_max_ratio`
TRIES = 10
PAD = 128  # grey; see `augment`

Window = tuple[int, int, int, int]  # top, left, bottom, right in pixels of the resized picture


def normalise(image: Tensor) -> Tensor:
    """uint8 `(B, 3, H, W)` -> float32 in [-1, 1], the range of every image in this repository."""
    return image.float().div_(127.5).sub_(1)


def fit(size: Size, short: int, long: int) -> Size:
    """The largest size of this aspect with a short side <= `short` and a long side <= `long`.

    Rounded as mmcv rounds (mmcv/image/geometric.py, `rescale_size`), and never below 1.
    """
    scale = min(long / max(size), short / min(size))
    return max(int(size[0] * scale + 0.5), 1), max(int(size[1] * scale + 0.5), 1)


def augment(
    image: Image.Image, labels: np.ndarray, crop: Size, short: int, long: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Random scale, crop, flip and colours: image `(3, H, W)` uint8, labels `(H, W)` uint8, (H, W) = crop.

    mmsegmentation's order: resize into 0.5-2 times the box (short, long), crop, mirror every second picture,
    distort its colours, pad on the right and below. Padding is 255 = ignore in the labels and 128 in the
    picture: 0.004 in [-1, 1], where mmsegmentation has the 0 that no uint8 gives. Resizing is antialiased and
    centred, where mmcv's is neither (see `resize` and `nearest`). `rng` should depend on the sample alone
    (see `randomness`).
    """
    ratio = rng.uniform(*RATIOS)  # the first number drawn: `TrainStream` looks at it ahead
    size = fit(labels.shape, int(short * ratio), int(long * ratio))
    window = choose_window(labels, size, crop, rng)
    pixels = to_tensor(resize(image, labels.shape, size, window))
    target = torch.from_numpy(nearest(labels, size, window))
    if coin(rng):
        pixels, target = pixels.flip(2), target.flip(1)
    pixels = photometric(pixels, rng)
    right, below = crop[1] - target.shape[1], crop[0] - target.shape[0]
    return F.pad(pixels, (0, right, 0, below), value=PAD), F.pad(target, (0, right, 0, below), value=IGNORE)


def evaluation(
    image: Image.Image, labels: np.ndarray, short: int | None, long: int | None
) -> tuple[Tensor, Tensor]:
    """Image `(3, h, w)` uint8 resized into the box (not if `short` is None); labels `(H, W)` as they are."""
    size = fit(labels.shape, short, long) if short else labels.shape
    return to_tensor(resize(image, labels.shape, size, (0, 0, *size))), torch.from_numpy(labels)


def choose_window(labels: np.ndarray, size: Size, crop: Size, rng: np.random.Generator) -> Window:
    """A window in which no class has 75 % of the labelled pixels; the 11th one in any case."""
    for _ in range(TRIES):
        window = draw_window(size, crop, rng)
        count = np.bincount(nearest(labels, size, window).ravel(), minlength=256)[:IGNORE]
        if count.max() < LARGEST_SHARE * count.sum():
            return window
        if window == (0, 0, *size):  # all of the picture: there is no other
            return window
    return draw_window(size, crop, rng)


def draw_window(size: Size, crop: Size, rng: np.random.Generator) -> Window:
    """A window of `crop`, anywhere in a picture of `size`; where the picture is smaller, all of it."""
    top, left = (int(rng.integers(max(whole - part, 0) + 1)) for whole, part in zip(size, crop, strict=True))
    return top, left, min(top + crop[0], size[0]), min(left + crop[1], size[1])


def nearest(labels: np.ndarray, size: Size, window: Window) -> np.ndarray:
    """The window of the labels resized to `size`: each pixel takes the label below its centre.

    Computed in whole numbers, so a window equals that part of the whole. mmcv takes the label below the
    pixel's corner, which shifts the labels against the picture by up to half a pixel.
    """
    top, left, bottom, right = window
    rows = (2 * np.arange(top, bottom) + 1) * labels.shape[0] // (2 * size[0])
    columns = (2 * np.arange(left, right) + 1) * labels.shape[1] // (2 * size[1])
    return labels[rows][:, columns]


def resize(image: Image.Image, original: Size, size: Size, window: Window) -> Image.Image:
    """The window of the picture resized to `size`, bilinear and antialiased (mmcv's aliases when it shrinks).

    Only the window is computed; Pillow's filter reads beyond its box, so this is that part of the whole, to
    rounding. `original` (H, W) is the picture's own size, of which `image` may be a half, a quarter or an
    eighth, rounded up.
    """
    reductions = [f for f in (1, 2, 4, 8) if image.size == (-(-original[1] // f), -(-original[0] // f))]
    assert reductions, f"the picture is {image.size}, but (W, H) of its labels is {original[::-1]}"
    y, x = (whole / (shown * reductions[0]) for whole, shown in zip(original, size, strict=True))
    top, left, bottom, right = window
    box = left * x, top * y, min(right * x, image.width), min(bottom * y, image.height)
    return image.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=box)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB -> uint8 `(3, H, W)`."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def photometric(image: Tensor, rng: np.random.Generator) -> Tensor:
    """uint8 `(3, H, W)` RGB -> the same, each step with probability 1/2 and cut off at 0 and 255.

    Brightness +-32, contrast 0.5-1.5, saturation 0.5-1.5, hue -36..34 degrees in steps of 2 (-18..17 in
    OpenCV's halves), and in every second picture the contrast last. mmsegmentation truncates after every
    step; we round once.
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


# ---- the order of samples, and batches in that order -----------------------------------------------------

ORDER, SAMPLE = 1, 2  # keep the two uses of a seed apart


def randomness(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of one sample: on any rank, in any worker, after any resumption the same."""
    return np.random.default_rng((SAMPLE, seed, epoch, index))


@lru_cache(maxsize=4)
def permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((ORDER, seed, epoch)).permutation(length)


@dataclass(frozen=True)
class Order:
    """Position in global samples -> (epoch, index): one permutation of 0..length-1 after the other."""

    length: int
    seed: int

    def __call__(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.length)
        return epoch, int(permutation(self.length, self.seed, epoch)[place])


def shard(start: int, count: int, rank: int, world: int, accumulate: int = 1) -> list[range]:
    """The positions that `rank` loads for the step of `count` samples from `start`, one range a micro-batch.

    The ranges of all ranks and micro-batches are disjoint, equally long, and together start..start+count-1:
    however a batch is divided, the step sees the same samples.
    """
    size, rest = divmod(count, world * accumulate)
    if rest or not size:
        raise DataError(
            f"a batch of {count} cannot be divided into {world} ranks x {accumulate} micro-batches: "
            f"use a multiple of {world * accumulate}"
        )
    firsts = [start + (a * world + rank) * size for a in range(accumulate)]
    return [range(first, first + size) for first in firsts]


class Item(NamedTuple):
    """One sample. `skipped` has a sentence for every unreadable file that this sample stands in for."""

    image: Tensor  # (3, H, W) uint8
    labels: Tensor  # (H, W) uint8
    position: int  # in global samples; in evaluation the index
    path: str
    skipped: list[str]


class Batch(NamedTuple):
    """One micro-batch of one rank, b items; bytes travel to the device, then `normalise` and `.long()`."""

    image: Tensor  # (b, 3, H, W) uint8
    labels: Tensor  # (b, H, W) uint8
    positions: list[int]
    paths: list[str]
    skipped: list[str]


class TrainStream:
    """The training samples of one rank in their global order, from any position on, for ever.

    A file that cannot be decoded is named in a DataWarning and the next index takes its place; `seen` and
    `replaced` count. More than 1 % of the samples that this rank has seen (and more than one) is a DataError;
    so is a label file with wrong content.
    """

    def __init__(
        self,
        dataset: Dataset,
        crop: Size,
        short: int,
        long: int,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        workers: int = 0,
        device: str = "cpu",
        tolerated: float = 0.01,
    ):
        shard(0, batch, rank, world, accumulate)  # refuses a batch that cannot be divided
        self.dataset, self.crop, self.short, self.long = dataset, crop, short, long
        self.batch, self.seed, self.order = batch, seed, Order(len(dataset), seed)
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.workers, self.device, self.tolerated = workers, device, tolerated
        self.seen = self.replaced = 0

    def batches(self, position: int = 0) -> Iterator[Batch]:
        """Micro-batches, `accumulate` to a step, from the step that starts at global sample `position`."""
        for batch in load_in_order(self, self.micro_batches(position), collate, self.workers, self.device):
            self.seen += len(batch.paths)
            for sentence in batch.skipped:
                self.replaced += 1
                warnings.warn(f"{sentence}; another picture takes its place", DataWarning, stacklevel=2)
                if self.replaced > max(1, self.tolerated * self.seen):
                    raise DataError(
                        f"{self.replaced} of the first {self.seen} samples could not be read, more than "
                        f"{self.tolerated:.0%}: mend the data set; the last one: {sentence}"
                    )
            yield batch

    def micro_batches(self, position: int) -> Iterator[range]:
        while True:
            yield from shard(position, self.batch, self.rank, self.world, self.accumulate)
            position += self.batch

    def __getitem__(self, position: int) -> Item | DataError:
        epoch, index = self.order(position)
        skipped: list[str] = []
        for i in range(index, index + min(len(self.dataset), 100)):
            try:
                return self.sample(position, epoch, i % len(self.dataset), skipped)
            except Unreadable as error:
                skipped.append(str(error))
            except DataError as error:
                return error  # raised in the main process: a worker would wrap it into a traceback
        return DataError(f"{len(skipped)} pictures in a row cannot be read, such as: {skipped[-1]}")

    def sample(self, position: int, epoch: int, index: int, skipped: list[str]) -> Item:
        ratio = randomness(self.seed, epoch, index).uniform(*RATIOS)  # what `augment` will draw first
        box = int(self.short * ratio), int(self.long * ratio)
        image, labels = self.dataset.load(index, *box)
        rng = randomness(self.seed, epoch, index)
        image, labels = augment(image, labels, self.crop, self.short, self.long, rng)
        return Item(image, labels, position, self.dataset.path(index), skipped)


@dataclass
class EvaluationStream:
    """Pictures resized into a box (not if `short` is None) with their labels at the original size."""

    dataset: Dataset
    short: int | None
    long: int | None
    workers: int = 0
    device: str = "cpu"

    def items(self, indices: Iterable[int]) -> Iterator[Item]:
        """One Item per index, in this order; a file that cannot be read is a DataError with its path."""
        yield from load_in_order(self, ([i] for i in indices), only, self.workers, self.device)

    def __getitem__(self, i: int) -> Item | DataError:
        try:
            image, labels = evaluation(*self.dataset.load(i, self.short, self.long), self.short, self.long)
        except DataError as error:
            return error
        return Item(image, labels, i, self.dataset.path(i), [])


def load_in_order(
    items: "TrainStream | EvaluationStream",
    groups: Iterable[Iterable[int]],
    merge: Callable[[list], Any],
    workers: int,
    device: str,
) -> Iterator:
    """merge([items[i] for i in group]) of each group, made ahead by `workers`; raises any DataError there."""
    loader = DataLoader(
        items,
        batch_sampler=groups,
        collate_fn=merge,
        num_workers=workers,
        worker_init_fn=ignore_signals,
        pin_memory=torch.device(device).type == "cuda",
        generator=torch.Generator(),  # without one, opening the iterator draws from the global generator
    )
    batches = iter(loader)
    # Workers that ignore SIGTERM must be told to end, or Python would wait for them for ever at its exit.
    end = batches._shutdown_workers if workers else lambda: None
    atexit.register(end)
    try:
        for merged in batches:
            if isinstance(merged, DataError):
                raise merged
            yield merged
    finally:
        atexit.unregister(end)
        end()


def ignore_signals(worker: int) -> None:
    """Ctrl-C and SIGTERM reach the whole process group: the main process decides, its workers end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def collate(items: list[Item | DataError]) -> Batch | DataError:
    for item in items:
        if isinstance(item, DataError):
            return item
    images, labels, positions, paths, skipped = map(list, zip(*items, strict=True))
    return Batch(torch.stack(images), torch.stack(labels), positions, paths, list(chain(*skipped)))


def only(items: list[Item | DataError]) -> Item | DataError:
    return items[0]


# ---- tags and captions from a file -----------------------------------------------------------------------

MOST_TAGS, LONGEST_TAG, LONGEST_CAPTION = 1000, 200, 10_000  # tags, characters: beyond, it is no such thing


class Tags(NamedTuple):
    """What a tag file says about a data set's pictures, by `Dataset.path`."""

    tags: dict[str, list[tuple[str, float]]]
    captions: dict[str, str]
    unknown: list[str]  # pictures in the file that the data set does not have


def read_tags(file: str | Path, root: str | Path, known: Collection[str]) -> Tags:
    """Read JSON lines `{"image": "relative/path.jpg", "tags": [["car", 0.93], ...], "caption": "optional"}`.

    `root` is the data set's, `known` its paths. Scores are in 0..1; the file's order stays. No picture is
    opened. Raises DataError with the line's number; pictures that the data set lacks are counted in a
    DataWarning.
    """
    root, known = os.path.abspath(root), frozenset(known)
    try:
        lines = Path(file).read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise DataError(
            f"{file} cannot be read ({error.strerror}): --tags needs a file of JSON lines"
        ) from None
    result, line_of = Tags({}, {}, []), {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            path, tags, caption = parse_tags(line, root)
        except ValueError as error:
            raise DataError(f"{file}, line {number}: {error}") from None
        if line_of.setdefault(path, number) != number:
            raise DataError(f"{file}, line {number}: {path} has tags in line {line_of[path]} already")
        if path not in known:
            result.unknown.append(path)
            continue
        result.tags[path] = tags
        if caption:
            result.captions[path] = caption
    if not result.tags:
        raise DataError(f'{file} has none of the {len(known)} pictures: "image" must be relative to {root}')
    if result.unknown:
        names = ", ".join(result.unknown[:SHOWN]) + (", ..." if len(result.unknown) > SHOWN else "")
        message = f"{file}: {len(result.unknown)} pictures are not in the data set: {names}"
        warnings.warn(message, DataWarning, stacklevel=2)
    return result


def parse_tags(line: bytes, root: str) -> tuple[str, list[tuple[str, float]], str]:
    """Path, tags and caption ("" if there is none) of one line; a ValueError says what is wrong with it."""
    try:
        entry = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("the text is not UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("each line must be one whole JSON object") from None
    match entry:
        case {"image": str(image)}:
            path = os.path.normpath(os.path.join(root, image))
        case _:
            raise ValueError('each line must be an object with "image", "tags" and perhaps "caption"')
    if not Path(path).is_relative_to(root):
        raise ValueError(f"the image {image[:80]!r} is outside of {root}")
    match entry.get("tags", []):
        case list(pairs) if len(pairs) <= MOST_TAGS:
            tags = [parse_tag(pair) for pair in pairs]
        case _:
            raise ValueError(f'"tags" must be a list of at most {MOST_TAGS} pairs like ["car", 0.93]')
    caption = entry.get("caption")
    return (
        Path(path).relative_to(root).as_posix(),
        tags,
        "" if caption is None else text(caption, LONGEST_CAPTION),
    )


def parse_tag(pair: object) -> tuple[str, float]:
    match pair:
        case [tag, int(score) | float(score)] if 0 <= score <= 1:
            return text(tag, LONGEST_TAG), float(score)
    raise ValueError(f'a tag must be a pair like ["car", 0.93] with a score in 0..1, not {str(pair)[:80]}')


def text(value: object, longest: int) -> str:
    """`value` with single blanks, if it is 1 to `longest` printable characters."""
    words = " ".join(value.split()) if isinstance(value, str) else ""
    if not 1 <= len(words) <= longest or not words.isprintable():
        raise ValueError(
            f"a tag or caption must be 1 to {longest} printable characters, not {str(value)[:80]!r}"
        )
    return words
