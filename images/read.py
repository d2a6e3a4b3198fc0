"""Decode one image or label file; list the files of a folder, in order. Independent of data sets and models.

Top to bottom: folders, images, label maps, the colours of classes without one.
"""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from errors import DataError, Unreadable

IGNORE = 255  # the label of pixels that belong to no class
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
LOSSLESS = (".png", ".bmp", ".tif", ".tiff")  # JPEG would mix the classes along every border
MAX_PIXELS = 64_000_000  # 192 MB decoded
SHOWN = 10  # paths in a message

Size = tuple[int, int]  # height, width


def find_images(inputs: Iterable[str], out: Path, taken: dict[str, str]) -> dict[str, str]:
    """Absolute path of each image -> the name of its results below --out, without ".png".

    A file is read whatever its suffix; of folders and globs the images (`SUFFIXES`) that are not hidden, and
    never what lies in `out`. taken: names of earlier results, in lower case -> their images.
    """
    paths, bases, out = [], [], os.path.realpath(out)
    for given in inputs:
        wild, exists = re.search(r"[*?[]", given), os.path.exists(given)
        if not exists and not wild:
            raise DataError(f"{given} does not exist: give an image, a folder or a quoted glob")
        roots = [given] if exists else sorted(glob.glob(given, recursive=True))
        new = [os.path.abspath(path) for root in roots for path in below(root, exists)]
        new = [path for path in new if not Path(os.path.realpath(path)).is_relative_to(out)]
        if not new:
            kinds = " ".join(SUFFIXES)
            raise DataError(f"{given} has no image ({kinds}) outside of --out {out}: change one of them")
        paths += new
        folder = given if exists else given[: wild.start()]
        folder = folder if os.path.isdir(given) else os.path.dirname(folder)
        bases += [os.path.abspath(folder), *map(os.path.dirname, new)]  # a glob may lead out by ".."
    base, names, taken = os.path.commonpath(bases), {}, dict(taken)
    for path in dict.fromkeys(paths):
        whole = os.path.relpath(path, base)
        stem = os.path.splitext(whole)[0]
        free = [name for name in (stem, whole) if taken.get(name.lower(), path) == path]
        if not free:
            raise DataError(f"{path} and {taken[stem.lower()]} would share {stem}.png: give another --out")
        names[path] = free[0]
        taken[free[0].lower()] = path
    return names


def below(root: str, given: bool) -> list[str]:
    """The file `root` if it was `given` or is an image, or the images below the folder `root`."""
    if os.path.isdir(root):
        files = [os.path.join(where, name) for where, _, names in walk(root) for name in names]
        return [file for file in files if file.lower().endswith(SUFFIXES)]
    hidden = os.path.basename(root).startswith(".")
    return [root] if given or (root.lower().endswith(SUFFIXES) and not hidden) else []


def scan(root: Path, folder: str, suffixes: tuple[str, ...], endings: tuple[str, ...]) -> dict[str, str]:
    """The files below root/folder: path without ending and suffix -> path relative to `root`, with "/".

    Of several files with one key, the one whose ending comes first is used; two of one ending are refused.
    """
    found: list[dict[str, str]] = [{} for _ in endings]
    longest_first = sorted(range(len(endings)), key=lambda place: -len(endings[place]))
    for where, _, names in walk(root / folder):
        below = Path(where).relative_to(root).as_posix() + "/"
        start = below.removeprefix(folder)
        for name in names:
            stem, dot, suffix = name.rpartition(".")
            if dot + suffix.lower() not in suffixes:
                continue
            for place in longest_first:
                if stem.endswith(endings[place]):
                    key, path = start + stem.removesuffix(endings[place]), below + name
                    if place and any(key in better for better in found[:place]):
                        break
                    if (other := found[place].setdefault(key, path)) is not path:
                        files = f"{root / other} and {root / path}"
                        raise DataError(f"{files} differ only in their extension: rename one")
                    break
    paths = found.pop()
    while found:
        paths |= found.pop()
    return paths


def walk(top: str | Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` in order, without hidden names; a folder that links lead to again is skipped."""
    seen = set()
    for where, folders, names in os.walk(top, followlinks=True, onerror=stop):
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:], names[:] = (sorted([x for x in some if x[0] != "."]) for some in (folders, names))
        yield where, folders, names


def stop(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be listed ({error.strerror}): exclude it") from None


@contextmanager
def opened(path: Path, limit: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """The file, open and not yet decoded; whatever goes wrong with it becomes an Unreadable that names it."""
    try:
        with path.open("rb", 1 << 18) as file, Image.open(file) as image:  # fewer, larger reads
            if image.width * image.height > limit:
                raise Image.DecompressionBombError(f"{image.width}x{image.height}")
            yield image
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise Unreadable(f"{path} is too large ({error}): at most {limit:,} pixels are read") from None
    except UnidentifiedImageError:
        fault = "is not an image, or its first bytes are corrupt"
        raise Unreadable(f"{path} {fault}: replace or remove it") from None
    except (OSError, SyntaxError, ValueError) as error:  # SyntaxError: a broken PNG
        reason = getattr(error, "strerror", None) or error
        raise Unreadable(f"{path} cannot be read ({reason}): replace or remove it") from None


GAP = 3  # a reduced JPEG keeps at least this many times the pixels, per side, that the image is resized to


def read_image(
    path: str | Path, short: int | None = None, long: int | None = None, limit: int = MAX_PIXELS
) -> tuple[Image.Image, Size]:
    """The first frame as 8-bit RGB, turned upright by its EXIF tag, and its full (H, W). Raises Unreadable.

    Grey, palette, CMYK and 16-bit images are converted; transparency is dropped, as OpenCV drops it. With
    the box (short, long) that it will be resized into, a JPEG 2 GAP times larger or more is decoded at 1/2,
    1/4 or 1/8. On photographs the resized image then differs by at most 0.8 of 255 levels on average, 3 in
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
        return to_rgb(image, path), (H, W)


def to_rgb(image: Image.Image, name: str | Path) -> Image.Image:
    """The image with 8 bits a channel, RGB. Raises Unreadable."""
    if image.mode == "F":
        raise Unreadable(f"{name} holds floating-point numbers (mode F): save it with 8 bits a channel")
    if image.mode.startswith("I"):  # 16 bits, which convert() would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.int32) >> 8).clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def fit(size: Size, short: int, long: int) -> Size:
    """The largest size of this aspect with a short side <= `short` and a long side <= `long`.

    Rounded as mmcv rounds (mmcv/image/geometric.py, `rescale_size`), and never below 1.
    """
    scale = min(long / max(size), short / min(size))
    return max(int(size[0] * scale + 0.5), 1), max(int(size[1] * scale + 0.5), 1)


def read_labels(path: str | Path, table: np.ndarray, hint: str = "") -> np.ndarray:
    """A label file as train ids `(H, W)` uint8, by `table` (see `label_table`). Raises DataError."""
    with opened(Path(path)) as image:
        if image.mode not in ("L", "P", "I") and not image.mode.startswith("I;16"):
            form = "labels are class numbers in a grey or palette PNG (mode L, P or I;16)"
            raise DataError(f"{path} has mode {image.mode}: {form}{hint}")
        raw = np.asarray(image)
    found = np.flatnonzero(histogram(raw)) if raw.dtype == np.uint8 else np.unique(raw)
    wrong = [int(x) for x in found if not 0 <= x <= 255 or table[x] < 0]
    if wrong:
        legal = np.flatnonzero(table >= 0)
        runs = np.split(legal, np.flatnonzero(np.diff(legal) > 1) + 1)
        spans = ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
        values = ", ".join(map(str, wrong[:SHOWN]))
        raise DataError(f"{path} holds the value {values}: labels here are {spans}{hint}")
    train_ids = bytearray(raw.astype(np.uint8)).translate(table.astype(np.uint8))
    return np.frombuffer(train_ids, np.uint8).reshape(raw.shape)


def histogram(labels: np.ndarray) -> np.ndarray:
    """How many of the pixels `(H, W)` uint8 have each value, (256,); in a third of `np.bincount`'s time."""
    return np.array(Image.fromarray(labels).histogram())


def label_table(raw: Iterable[int], ignored: Iterable[int]) -> np.ndarray:
    """A table raw value 0..255 -> train id, 255 = ignore, -1 = illegal. Raw 255 always means ignore."""
    table = np.full(256, -1, np.int16)
    table[[*ignored, IGNORE]] = IGNORE
    for train_id, value in enumerate(raw):
        table[value] = train_id
    return table


def distinct_colour(n: int) -> list[int]:
    """Colour n of PASCAL VOC's map, 1..255: the bits of n are dealt to R, G, B in turn, high bits first."""
    return [sum((n >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)]
