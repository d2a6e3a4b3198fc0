"""Pictures with dense labels: data sets as their authors publish them, the check before training, tag files.

    dataset = open_dataset("ade20k", "data/ADEChallengeData2016", "train")
    print(check(dataset))
    picture, labels = dataset.load(0)

Pictures are 8-bit RGB; labels are uint8 `(H, W)` with classes 0..K-1 and 255 = ignore.

Top to bottom: the layouts and what opens them, tables of classes, one picture or label file, the check, tags
and captions from a file. What is done to a picture and its labels is in augment.py, the batches in stream.py.
"""

import codecs
import json
import os
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

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


def walk(top: str | Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` in order, without what is hidden. A folder that links lead to again is left out.

    Raises DataError where a folder cannot be listed.
    """
    seen = set()
    for where, folders, names in os.walk(top, followlinks=True, onerror=stop):
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:], names[:] = (sorted(x for x in some if not x.startswith(".")) for some in (folders, names))
        yield where, folders, names


def stop(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be listed ({error.strerror}): leave it out") from None


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
        image.info = {}  # exif_transpose would write EXIF anew, odd or not; convert() warns of transparency
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "F":
            raise Unreadable(f"{path} holds floating-point numbers (mode F): save it with 8 bits a channel")
        if image.mode.startswith("I"):  # 16 bits, which convert() would clip at 255
            image = Image.fromarray((np.asarray(image).astype(np.int32) >> 8).clip(0, 255).astype(np.uint8))
        return image if image.mode == "RGB" else image.convert("RGB"), (H, W)


def fit(size: Size, short: int, long: int) -> Size:
    """The largest size of this aspect with a short side <= `short` and a long side <= `long`.

    Rounded as mmcv rounds (mmcv/image/geometric.py, `rescale_size`), and never below 1.
    """
    scale = min(long / max(size), short / min(size))
    return max(int(size[0] * scale + 0.5), 1), max(int(size[1] * scale + 0.5), 1)


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


class Words:
    """The words of each picture of a data set, from where `--tags` says."""

    def __init__(self, tags: str, prompts: Sequence[str], table: dict[str, list[str]] | None = None):
        self.tags, self.prompts, self.table = tags, prompts, table

    def __call__(self, path: str, present: Collection[int]) -> list[str] | None:
        """The words of the picture at `path` (`Dataset.path`) in whose whole label map `present` are seen.

        None where there are none per picture: "classes", and "clip", whose tagger looks at the picture.
        """
        if self.tags == "oracle":
            return [self.prompts[k] for k in present]
        return None if self.table is None else self.table[path]


def open_words(
    condition: str, tags: str, prompts: Sequence[str], root: str | Path, paths: Collection[str]
) -> Words:
    """`tags` is "classes", "clip", "oracle" or a tag file, of which condition "caption" takes the captions.

    Raises DataError if the file cannot be read or lacks one of the pictures at `paths`.
    """
    if tags in ("classes", "clip", "oracle"):
        return Words(tags, prompts)
    found = read_tags(tags, root, paths)
    if condition == "caption":
        table = {path: [caption] for path, caption in found.captions.items()}
    else:
        table = {path: [tag for tag, _ in pairs] for path, pairs in found.tags.items()}
    lacking = sorted(set(paths) - set(table))
    if lacking:
        what = "caption" if condition == "caption" else "line"
        raise DataError(
            f"{tags} has no {what} for {len(lacking)} of {len(paths)} pictures, such as {lacking[0]}"
        )
    return Words(tags, prompts, table)


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
