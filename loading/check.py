"""The check of a data set before training: `print(check(dataset))`."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import Dataset
from errors import DataError
from images.read import IGNORE, SHOWN, Size
from run.files import read_bytes

MUCH = 0.05  # of the pixels ignored, to suspect a class behind 255; in CamVid 4 % are unlabelled


@dataclass
class Report:
    """What `check` counted; `str` makes it a table."""

    title: str
    classes: list[str]
    sizes: list[Size]  # of the images that were read
    pixels: np.ndarray  # (256,) of each train id in them
    fingerprint: dict[str, str]  # hashes of what training reads, by what they are of
    warnings: list[str]

    def __str__(self) -> str:
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
            lines.append(f"  absent ({len(absent)}): {', '.join(absent)}")
        return "\n".join([*lines, *(f"  WARNING: {sentence}" for sentence in self.warnings)])


def check(dataset: Dataset, samples: int = 200) -> Report:
    """Check the size of every file, and decode `samples` evenly spaced images with their labels.

    The sizes and times of all files are hashed, to recognise the data when a run resumes. Raises DataError
    with at most ten of the faults: missing counterparts, files that are empty or cannot be decoded, labels of
    a wrong mode, value or size, no labelled pixel at all. Training labels of one class are refused too,
    unless there are instances to learn; all files are read before.
    """
    faults, opened, sizes, unreadable = list(dataset.missing), [], [], set()
    pixels = np.zeros(256, np.int64)
    files = {"images": [], "labels": []}  # their sizes in bytes and times in ns
    for i, (kind, file) in ((j, pair) for j in range(len(dataset)) for pair in zip(files, dataset.names(j))):
        files[kind].append(size_and_time(file))
        if not files[kind][-1][0]:
            faults.append(f"{Path(file)} is empty or missing")
            unreadable.add(i)

    def read(i: int) -> None:
        opened.append(i)
        try:
            labels = dataset.load(i).labels
        except DataError as error:
            if str(error) not in dataset.missing:
                faults.append(str(error))
            return
        sizes.append(labels.shape)
        np.add(pixels, np.bincount(labels.ravel(), minlength=256), out=pixels)

    chosen = {*np.linspace(0, len(dataset) - 1, min(samples, len(dataset))).astype(int).tolist()}
    for i in sorted(chosen - unreadable):
        read(i)
    if sizes and not pixels[:IGNORE].any():
        faults.append(f"all {len(sizes)} label files that were read hold only ignored pixels")
    if dataset.split == "train" and dataset.categories is None and single(pixels) and not faults:
        for i in tqdm(sorted({*range(len(dataset))} - chosen), "looking for a second class", disable=None):
            read(i)
            if not single(pixels):
                break
        else:
            faults += doubts(dataset, pixels)
    whole, count = f"{dataset.name} {dataset.split}", f"{len(dataset):,} images, {len(opened):,} of them"
    if faults:
        message = f"{whole} has {len(faults)} faults ({count} opened), repair or remove what they name:"
        more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
        raise DataError("\n  ".join([message, *faults[:SHOWN], *more]))
    of = fingerprint_of(dataset, files), doubts(dataset, pixels)
    return Report(f"{whole}: {count} decoded with their labels", dataset.classes, sizes, pixels, *of)


def fingerprint_of(dataset: Dataset, files: dict[str, list[tuple[int, int]]]) -> dict[str, str]:
    """Hashes of the list of images (in older runs "pictures"), of the labels' table, of sizes and times."""
    split = {"train": "training", "val": "validation"}.get(dataset.split, dataset.split)
    names = os.fsencode("\n".join(dataset.paths))
    tables = b"".join(read_bytes(file) for file in dataset.tables)
    contents = {f"the list of {split} pictures": names, f"the table of the {split} labels": tables}
    for kind, stats in files.items():
        sizes, times = np.array(stats, np.int64).reshape(-1, 2).T.copy()
        contents |= {f"a size among the {split} {kind}": sizes, f"a time among the {split} {kind}": times}
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def size_and_time(file: str) -> tuple[int, int]:
    """Bytes and nanoseconds of the last change; 0 and 0 of a file that cannot be looked up."""
    try:
        status = os.stat(file)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def single(pixels: np.ndarray) -> bool:
    """Whether one class alone has pixels."""
    return np.count_nonzero(pixels[:IGNORE]) == 1


def doubts(dataset: Dataset, pixels: np.ndarray) -> list[str]:
    """A sentence if the labels hold one class, or if one's own lack a class while MUCH is ignored."""
    counts, ignored = pixels[: len(dataset.classes)], pixels[IGNORE] / max(pixels.sum(), 1)
    colours = zip(dataset.classes, dataset.palette.tolist(), strict=True)
    absent = [named for named, count in zip(colours, counts, strict=True) if not count]
    if single(pixels):
        name = dataset.classes[counts.argmax()]
        sentence = f"all labels are {name!r}, which leaves nothing to learn: label a second class"
    elif dataset.name == "folder" and absent and ignored > MUCH:
        sentence = f"{ignored:.0%} of the pixels are ignored and none is {absent[0][0]!r}: check the labels"
    else:
        return []
    if dataset.name == "folder" and ignored:
        name, colour = (absent or [("background", (0, 0, 0))])[0]
        line = ", ".join([name, " ".join(map(str, colour)), "255"])
        sentence += f"; 255 is read as unlabelled: if it means {name!r}, write `{line}` in classes.txt"
    return [sentence]
