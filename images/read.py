"""Decode one image or label file; list the files of a folder, in order. Independent of data sets and models.

Top to bottom: folders, images, label maps.
"""

import glob
import os
import re
import stat
import unicodedata
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from errors import DataError, Unreadable
from images.kinds import bmp_bits, refusal, unidentified

IGNORE = 255  # the label of pixels that belong to no class
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")  # Pillow has others, and Ghostscript for EPS
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif")
LABEL_FORMATS = ("PNG", "BMP", "TIFF")
LOSSLESS = (".png", ".bmp", ".tif", ".tiff")  # JPEG mixes the classes along every border, GIF renumbers them
MAX_PIXELS = 64_000_000  # 192 MB decoded
SHOWN = 10  # paths in a message

Size = tuple[int, int]  # height, width
Colours = Mapping[tuple[int, int, int], int]  # (R, G, B) -> train id, 255 = ignore


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
    for folder in {parent for path in paths for parent in Path(os.path.relpath(path, base)).parents}:
        stem, suffix = os.path.splitext(str(folder).lower())
        if suffix in (".png", ".jpg"):  # folders x.png and x.overlay.jpg are in the way of x's results
            taken = dict.fromkeys((stem, os.path.splitext(stem)[0]), os.path.join(base, folder)) | taken
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
    chosen: dict[str, tuple[int, str]] = {}  # key -> the place of the file's ending, its path
    longest_first = sorted(endings, key=len, reverse=True)
    for where, _, names in walk(root / folder):
        below = Path(where).relative_to(root).as_posix() + "/"
        start = below.removeprefix(folder)
        for name in names:
            stem, dot, suffix = name.rpartition(".")
            if dot + suffix.lower() not in suffixes:
                continue
            for ending in filter(stem.endswith, longest_first):
                key, path = start + stem.removesuffix(ending), below + name
                place, other = chosen.setdefault(key, (endings.index(ending), path))
                if place > endings.index(ending):
                    chosen[key] = endings.index(ending), path
                elif place == endings.index(ending) and other is not path:
                    files = f"{root / other} and {root / path}"
                    raise DataError(f"{files} differ only in their extension: rename one")
                break
    return {key: path for key, (_, path) in chosen.items()}


def spelling(name: str, folder: Path, listed: Container[str] = ()) -> str:
    """The name as `folder`, which holds what is `listed`, spells it: in which Unicode composition."""
    if name in listed or name.isascii():
        return name
    forms = [name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))]
    return next((x for x in forms if x in listed or (folder / x).exists()), name)


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
def reading(path: str | Path) -> Iterator[BinaryIO]:
    """The open file; whatever is raised while it is decoded becomes an Unreadable that names it."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a named pipe may wait for ever
            raise Unreadable(f"{path} is a folder, pipe, socket or device: give a regular file")
        with open(path, "rb", 1 << 18) as file:  # fewer, larger reads
            try:
                yield file
            except UnidentifiedImageError:
                raise Unreadable(f"{path} {unidentified(file)}") from None
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise Unreadable(f"{path} is too large ({error}): at most {MAX_PIXELS:,} pixels are read") from None
    except Exception as error:  # noqa: BLE001 - decoders raise anything: RuntimeError, struct.error, ...
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise Unreadable(f"{path} cannot be read ({reason}): replace or remove it") from None


def decode(
    file: BinaryIO, labels: bool = False, box: tuple[int, int] | None = None
) -> tuple[Image.Image, Size, str]:
    """The first frame of an open file, turned upright; its full (H, W); the form of its samples in the file.

    box: as (short, long) of `read_image`. The form is Pillow's raw mode: "L;4" is grey of 4 bits. Pillow gets
    no name, by which it would read a TIFF that lies on its side in stripes (findings/pillow_turned_tiff.sh).
    """
    if sentence := refusal(file):
        raise Unreadable(f"{file.name} {sentence}")
    with Image.open(file, formats=FORMATS) as image:
        if labels and (image.format not in LABEL_FORMATS or image.info.get("compression") == "jpeg"):
            raise Unreadable(f"{file.name} is {image.format}, which alters class numbers: save labels as PNG")
        if image.format == "BMP" and {"1": 1, "L": 8}.get(image.mode, bits := bmp_bits(file)) != bits:
            raise Unreadable(f"{file.name} is a BMP of {bits} bits in greys, not read: save it as PNG")
        W, H = image.size
        if W * H > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{W}x{H}")
        if box:
            h, w = fit((H, W), *box)
            image.draft(None, (GAP * w, GAP * h))
        form = image.tile[0].args if image.tile else ""
        image.load()
        try:
            orientation = image.getexif().get(0x0112)
        except Exception:  # noqa: BLE001 - a damaged EXIF block counts as none
            orientation = 1
        image.info = {}  # exif_transpose would write EXIF anew, odd or not; convert() warns of transparency
        if orientation in range(2, 9):
            W, H = (H, W) if orientation > 4 else (W, H)
            ImageOps.exif_transpose(image, in_place=True)
        return image, (H, W), str(form[0] if isinstance(form, tuple) else form)


GAP = 3  # a reduced JPEG keeps at least this many times the pixels, per side, that the image is resized to


def read_image(
    path: str | Path, short: int | None = None, long: int | None = None
) -> tuple[Image.Image, Size]:
    """The first frame as 8-bit RGB, turned upright by its EXIF tag, and its full (H, W). Raises Unreadable.

    Grey, palette, CMYK and 16-bit images are converted; transparency is dropped, as OpenCV drops it. With
    the box (short, long) that it will be resized into, a JPEG 2 GAP times larger or more is decoded at 1/2,
    1/4 or 1/8. On photographs the resized image then differs by at most 0.8 of 255 levels on average, 3 in
    99 of 100 pixels.
    """
    with reading(path) as file:
        image, size, _ = decode(file, box=(short, long) if short else None)
        return to_rgb(image, path), size


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


def read_labels(
    path: str | Path, table: np.ndarray, hint: str = "", colours: Colours | None = None
) -> np.ndarray:
    """A label file as train ids `(H, W)` uint8, by `table` (see `label_table`). Raises DataError.

    Label files in RGB are looked up in `colours`. Grey and palette files hold class numbers in any case.
    """
    with reading(path) as file:
        image, _, form = decode(file, labels=True)
    if colours and image.mode in ("RGB", "RGBA"):
        return by_colour(image, colours, path)
    if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
        right = "labels are class numbers in a grey or palette PNG (mode 1, L, P or I;16)"
        cure = "; if each class has a colour of its own, add the colours to classes.txt"
        cure = hint or (cure if image.mode.startswith("RGB") else "")
        raise DataError(f"{path} has mode {image.mode}: {right}{cure}")
    if re.search(r";\d?I", form):
        raise DataError(f"{path} stores white as 0 (a TIFF's photometric 0): save labels as PNG")
    raw = np.asarray(image, np.uint8) if image.mode == "1" else np.asarray(image)
    if bits := re.fullmatch(r"L;([24])R?", form):  # which Pillow spreads over 0..255
        raw = raw // (255 // (2 ** int(bits[1]) - 1))
    occurring = np.flatnonzero(histogram(raw)) if raw.dtype == np.uint8 else np.unique(raw)
    wrong = [int(x) for x in occurring if not 0 <= x <= 255 or table[x] < 0]
    if wrong:
        legal = np.flatnonzero(table >= 0)
        runs = np.split(legal, np.flatnonzero(np.diff(legal) > 1) + 1)
        spans = ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
        values = ", ".join(map(str, wrong[:SHOWN]))
        unlabelled = "" if colours is None else unlabelled_line(wrong, table)
        raise DataError(f"{path} holds the value {values}: labels here are {spans}{hint}{unlabelled}")
    train_ids = bytearray(raw.astype(np.uint8)).translate(table.astype(np.uint8))
    return np.frombuffer(train_ids, np.uint8).reshape(raw.shape)


def by_colour(image: Image.Image, colours: Colours, path: str | Path) -> np.ndarray:
    """The train id of each pixel's colour, `(H, W)` uint8."""
    pixels = np.asarray(image.convert("RGBA")).view("<u4")[..., 0] & 0xFFFFFF  # R + 256 G + 65536 B
    table = np.zeros(1 << 24, np.uint16)  # train id + 1, 0 = unknown; where no colour is, no memory is used
    for (r, g, b), train_id in colours.items():
        table[r | g << 8 | b << 16] = train_id + 1
    labels = table[pixels]
    if not labels.all():
        values, counts = np.unique(pixels[labels == 0], return_counts=True)
        most = int(values[counts.argmax()])
        colour = f"{most & 255} {most >> 8 & 255} {most >> 16} in {counts.max()} pixels"
        count = f"{len(values)} in all, most often {colour}"
        raise DataError(f"{path} has colours that classes.txt lacks ({count}): add them to it")
    return (labels - 1).astype(np.uint8)


def histogram(labels: np.ndarray) -> np.ndarray:
    """How many of the pixels `(H, W)` uint8 have each value, (256,); in a third of `np.bincount`'s time."""
    return np.array(Image.fromarray(labels).histogram())


def label_table(raw: Iterable[int], ignored: Iterable[int]) -> np.ndarray:
    """A table raw value 0..255 -> train id, 255 = ignore, -1 = illegal. 255 is ignored if no class has it."""
    table = np.full(256, -1, np.int16)
    table[[*ignored, IGNORE]] = IGNORE
    for train_id, value in enumerate(raw):
        table[value] = train_id
    return table


def unlabelled_line(wrong: list[int], table: np.ndarray) -> str:
    """What to write in classes.txt if the values of a file that are `wrong` show that 0 may be unlabelled."""
    last = max(np.flatnonzero(table[:IGNORE] >= 0), default=IGNORE)
    if 0 in wrong:
        return "; if 0 means unlabelled, add the line `ignore, 0 0 0, 0` to classes.txt"
    if wrong == [last + 1]:
        return "; if 0 means unlabelled and the classes begin at 1, write `ignore` above them in classes.txt"
    return ""
