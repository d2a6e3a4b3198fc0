"""The check of a data set before training: `print(check(dataset))`."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import Dataset
from errors import DataError
from images.read import IGNORE, SHOWN, Size


@dataclass
class Report:
    """What `check` counted; `str` makes it a table."""

    title: str
    classes: list[str]
    sizes: list[Size]  # of the images that were read
    pixels: np.ndarray  # (256,) of each train id in them
    faults: list[str]  # one sentence for each, with its path
    fingerprint: dict[str, str]  # hashes of what training reads, by what they are of

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
            lines.append(f"  absent ({len(absent)}): {', '.join(absent)}")
        return "\n".join(lines)


class CheckError(DataError):
    """The faults that `check` found; `report` holds the table and every fault."""

    report: Report


def check(dataset: Dataset, samples: int = 200) -> Report:
    """Check the size of every file, and decode `samples` evenly spaced images with their labels.

    The sizes and times of all files are hashed, to recognise the data when a run resumes.
    Raises CheckError, with at most ten of the faults: missing counterparts, files that are empty or cannot be
    decoded, labels of a wrong mode, value or size, no labelled pixel at all.
    """
    faults, sizes, pixels, unreadable = list(dataset.missing), [], np.zeros(256, np.int64), set()
    files = {"images": [], "labels": []}  # their sizes in bytes and times in ns
    for i, (kind, file) in ((j, pair) for j in range(len(dataset)) for pair in zip(files, dataset.names(j))):
        try:
            stat = os.stat(file)
            files[kind].append((stat.st_size, stat.st_mtime_ns))
            empty = stat.st_size == 0
        except OSError:
            empty = True
        if empty:
            faults.append(f"{Path(file)} is empty or missing")
            unreadable.add(i)
    chosen = np.linspace(0, len(dataset) - 1, min(samples, len(dataset))).astype(int).tolist()
    for i in sorted({*chosen} - unreadable):
        try:
            labels = dataset.load(i).labels
        except DataError as error:
            if str(error) not in dataset.missing:
                faults.append(str(error))
            continue
        sizes.append(labels.shape)
        pixels += np.bincount(labels.ravel(), minlength=256)
    if sizes and not pixels[:IGNORE].any():
        faults.append(f"all {len(sizes)} label files that were read hold only ignored pixels")
    title = f"{dataset.name} {dataset.split}: {len(dataset):,} images, {len(sizes):,} of them read"
    report = Report(title, dataset.classes, sizes, pixels, faults, fingerprint_of(dataset, files))
    if faults:
        message = f"{dataset.name} {dataset.split} has {len(faults)} faults, repair or remove these files:"
        more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
        error = CheckError("\n  ".join([message, *faults[:SHOWN], *more]))
        error.report = report
        raise error
    return report


def fingerprint_of(dataset: Dataset, files: dict[str, list[tuple[int, int]]]) -> dict[str, str]:
    """Hashes of the list of images, of the labels' meaning, of the sizes and times of images and labels."""
    split = {"train": "training", "val": "validation"}.get(dataset.split, dataset.split)
    names = os.fsencode("\n".join(dataset.path(i) for i in range(len(dataset))))
    contents = {f"the list of {split} pictures": names, f"the meaning of the {split} labels": dataset.meaning}
    for kind, stats in files.items():
        sizes, times = np.array(stats, np.int64).reshape(-1, 2).T.copy()
        contents |= {f"a size among the {split} {kind}": sizes, f"a time among the {split} {kind}": times}
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
