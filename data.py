"""Images with dense labels: data sets as their authors publish them, the check before training.

    dataset = open_dataset("ade20k", "data/ADEChallengeData2016", "train")
    print(check(dataset))
    picture, labels = dataset.load(0)

Images are 8-bit RGB; labels are uint8 `(H, W)` with classes 0..K-1 and 255 = ignore.

Top to bottom: the layouts and what opens them, tables of classes, the check. Decoding is in images/read.py, tag
files are in loading/tags.py, what is done to an image and its labels in loading/augment.py.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from errors import DataError
from images import scenes
from images.read import (
    IGNORE,
    LOSSLESS,
    PICTURES,
    SHOWN,
    Size,
    distinct_colour,
    label_table,
    read_labels,
    read_picture,
    walk,
)

TRAIN_IDS = "_labelTrainIds"  # label files with this ending already hold 0..K-1

Sample = tuple[Image.Image, np.ndarray]  # an RGB picture and its labels (H, W) uint8


class CheckError(DataError):
    """What `check` found; `report` holds the table and every fault."""

    def __init__(self, message: str, report: "Report"):
        super().__init__(message)
        self.report = report


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
        self.missing: list[str] = []  # a sentence for each picture or label file without its counterpart

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
        self.raw_ids, self.train_ids = label_table(raw, layout.ignored), label_table(range(len(classes)), ())
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

    A line is "name", "name, r g b" or "name, r g b, raw value"; a class without a colour gets its own.
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


def scan(root: Path, folder: str, suffixes: tuple[str, ...], endings: tuple[str, ...]) -> dict[str, str]:
    """Files below root/folder: relative path without ending and suffix -> path relative to `root`, with "/".

    Of several files with one key, the one whose ending comes first is taken; two of one ending are refused.
    """
    found: dict[str, tuple[int, str]] = {}
    for where, _, names in walk(root / folder):
        below = Path(where).relative_to(root).as_posix()
        for name in names:
            stem, suffix = os.path.splitext(name)
            fits = [ending for ending in endings if stem.endswith(ending)]
            if suffix.lower() not in suffixes or not fits:
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
