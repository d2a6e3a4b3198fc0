"""The check of a data set before training: `print(check(dataset))`."""

import os
from dataclasses import dataclass

import numpy as np

from data import Dataset
from errors import DataError
from images.read import IGNORE, SHOWN, Size


class CheckError(DataError):
    """The faults that `check` found; `report` holds the table and every fault."""

    def __init__(self, message: str, report: "Report"):
        super().__init__(message)
        self.report = report


@dataclass
class Report:
    """What `check` counted; `str` makes it a table."""

    title: str
    classes: list[str]
    sizes: list[Size]  # of the images that were read
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
        rows = [cells[i : i + 3] for i in range(0, len(cells), 3)]
        lines += ["".join(cell.ljust(width) for cell in row).rstrip() for row in rows]
        absent = [name for name, count in zip(self.classes, counts, strict=True) if not count]
        if absent:
            lines.append(f"  absent ({len(absent)}): {', '.join(absent)}")
        return "\n".join(lines)


def check(dataset: Dataset, samples: int = 200) -> Report:
    """Check the size of every file, and decode `samples` evenly spaced images with their labels.

    Raises CheckError, with at most ten of the faults: missing counterparts, files that are empty or cannot be
    decoded, labels of a wrong mode, value or size, no labelled pixel at all.
    """
    faults, sizes, pixels, unreadable = list(dataset.missing), [], np.zeros(256, np.int64), set()
    for i in range(len(dataset)):
        for file in dataset.files(i):
            if not (os.path.exists(file) and os.path.getsize(file)):
                faults.append(f"{file} is empty or missing")
                unreadable.add(i)
    chosen = np.linspace(0, len(dataset) - 1, min(samples, len(dataset))).astype(int).tolist()
    for i in [i for i in chosen if i not in unreadable]:
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
    report = Report(title, dataset.classes, sizes, pixels, faults)
    if faults:
        more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
        title = f"{dataset.name} {dataset.split} has {len(faults)} faults, repair or remove these files:"
        raise CheckError("\n  ".join([title, *faults[:SHOWN], *more]), report)
    return report
