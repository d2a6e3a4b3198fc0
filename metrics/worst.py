"""The images of an evaluation with the lowest mIoU, drawn beside their ground truth."""

import math
from pathlib import Path

import numpy as np
from torch import Tensor

from data import Dataset
from images.draw import Target, compared, mosaic
from loading.stream import Item
from metrics.report import class_iou, confusion, percent
from run.files import place, replacing
from run.ranks import Ranks


class WorstImages:
    """Keeps what is predicted for the `most` images of this process with the lowest mIoU, to `draw` it."""

    def __init__(self, dataset: Dataset, most: int):
        self.dataset, self.most = dataset, most
        self.kept: list[tuple[float, int, Target, list[str] | None]] = []  # mIoU, index; what is drawn

    def add(self, item: Item, labels: Tensor, target: Target, tags: list[str] | None) -> None:
        """An image's predicted labels `(H, W)`, and their form to draw; without a labelled pixel, none."""
        counts = confusion(item.labels.to(labels.device), labels, len(self.dataset.classes))
        score = class_iou(counts).nanmean().item()
        if not math.isnan(score):
            self.kept.append((score, item.position, target, tags))
            self.kept = sorted(self.kept, key=lambda image: image[:2])[: self.most]

    def draw(self, folder: Path, ranks: Ranks) -> list[tuple[float, int]]:
        """Draw the worst of all processes, each by the one that keeps it; return mIoU and index of each."""
        worst = sorted(ranks.all_gather_object([image[:2] for image in self.kept]))[: self.most]
        names = {"palette": self.dataset.palette, "classes": self.dataset.classes}
        for score, i, target, tags in self.kept:
            if (score, i) in worst:
                sample, path = self.dataset.load(i), Path(self.dataset.paths[i])
                truth = (sample.ids, sample.segments) if isinstance(target, tuple) else sample.labels
                targets = {"ground truth": truth, f"prediction, mIoU {percent(score, '%')}": target}
                tiles = compared(np.asarray(sample.image), path.name, targets, tags, **names)
                name = f"{1 + worst.index((score, i)):02}-{path.stem}"[:60]  # of at most 255 bytes
                with replacing(place(folder.parent, f"{folder.name}/{name}.jpg")) as new:
                    mosaic(tiles, len(tiles)).save(new, quality=92)
        return worst
