"""What a model finds is counted: PQ, SQ, RQ, AP of things, and the files that COCO's server takes.

    judge = PanopticEvaluator(dataset, "mask2former", folder=out / "panoptic", instances=True)
    judge.add(item, ids, segments, instances)  # every picture of this process, at its own size
    found = judge.end(ranks)                   # `PanopticResult`, the same in all processes

The measures are panoptic.py's. A semantic decoder is judged too, by the connected components of its classes:
what a panoptic decoder must beat.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from errors import DataError
from images.panoptic import annotation, write_annotations, write_ids
from loading.jitter import PanopticTruth
from mask2former import Instances
from metrics.quality import Quality, average_precision, coco_results, coco_truth, count, pycocotools
from panoptic_data import PanopticDataset, PanopticFiles
from run.ranks import Ranks

GROUPS = ("all", "things", "stuff")


@dataclass
class PanopticResult:
    """The segments of all pictures, measured."""

    how: str  # what made the segments of a picture
    quality: Quality
    precision: dict[str, float] | None  # AP, AP50, ... of things; None where it was not asked for
    lacking: str = ""  # why there is no AP although it was

    def as_json(self) -> dict[str, str | float | None]:
        """PQ, SQ, RQ, PQ_things, ..., PQ_stuff, ..., AP, ...; None where nothing was counted."""
        numbers = {}
        for which in GROUPS:
            mean, end = self.quality.mean(which), "" if which == "all" else f"_{which}"
            numbers |= {f"{name}{end}": mean[name] for name in ("PQ", "SQ", "RQ")}
        numbers |= self.precision or {}
        known = {name: None if math.isnan(x) else x for name, x in numbers.items()}
        return {"segments": self.how, **known} | ({"AP": None} if self.lacking else {})


class PanopticEvaluator:
    """Counts one process's pictures; with a `folder` it also writes their ids, as PNGs.

    They lie beside the folder, in `.tmp-` and its name, until all are there: neither may be there before.
    """

    def __init__(
        self, dataset: PanopticDataset, how: str, folder: Path | None = None, instances: bool = False
    ):
        self.dataset, self.how, self.folder = dataset, how, folder
        self.new = folder and folder.with_name(f".tmp-{folder.name}")
        self.counts = torch.zeros(len(dataset.classes), 4, dtype=torch.float64)
        self.images: list[dict] = []
        self.entries: list[dict] = []
        self.truth: list[dict] = []
        self.results: list[dict] = []
        self.lacking = ""
        try:
            if instances:
                pycocotools("mask")
        except DataError as error:
            self.lacking = str(error)
        self.instances = instances and not self.lacking

    def add(
        self, item: PanopticTruth, ids: np.ndarray, segments: Sequence, instances: Instances | None = None
    ) -> None:
        """One picture: ids `(H, W)` with their segments, and the things that may overlap."""
        self.counts += count(item.ids, item.segments, ids, segments, len(self.counts))
        image_id, (H, W) = self.dataset.image_ids[item.position], ids.shape
        categories = self.dataset.categories.ids
        name = "/".join(Path(item.path).parts[1:])
        self.images.append({"id": image_id, "file_name": name, "height": H, "width": W})
        if self.folder is not None:
            files = isinstance(self.dataset, PanopticFiles)
            png = self.dataset.annotations.pngs[item.position] if files else f"{name}.png"
            write_ids(ids, self.new / png)
            self.entries.append(annotation(image_id, png, ids, segments, categories))
        if self.instances and instances is not None:
            labels, scores, masks = (x.cpu() for x in instances)
            things = zip(scores.tolist(), labels.tolist(), masks.numpy(), strict=True)
            self.results += coco_results(image_id, things, categories)
            self.truth += coco_truth(image_id, item.ids, item.segments, categories)

    def end(self, ranks: Ranks) -> PanopticResult:
        """The measures of all processes' pictures; rank 0 names the folder and writes the JSON beside it."""
        counts = ranks.all_reduce(self.counts.to(ranks.device)).cpu()
        images, entries, truth, results = (
            ranks.all_gather_object(x) for x in (self.images, self.entries, self.truth, self.results)
        )
        precision = None
        if self.instances:
            precision = average_precision(images, truth, results, self.dataset.categories)
        if self.folder is not None and ranks.is_main:
            os.rename(self.new, self.folder)
            write_annotations(self.folder.with_suffix(".json"), self.dataset.categories, images, entries)
        return PanopticResult(
            self.how, Quality(counts, self.dataset.categories.things), precision, self.lacking
        )
